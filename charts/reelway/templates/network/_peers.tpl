{{/* Pods of a component as a peer. (dict "context" . "component" "serving") */}}
{{- define "reelway.peer" -}}
podSelector:
  matchLabels: {{- include "reelway.selector" . | nindent 4 }}
{{- end -}}

{{- define "reelway.dnsEgress" -}}
- to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}

{{/* Port of auth.jwt.jwksUrl. */}}
{{- define "reelway.keySetPort" -}}
{{- $url := urlParse .Values.auth.jwt.jwksUrl -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}

{{/* The API server is no pod, so only its addresses can be allowed: those of its Service and, as most network plugins apply
     policies after the Service is resolved, those of its machines. */}}
{{- define "reelway.apiServerEgress" -}}
{{- $api := .Values.networkPolicies.apiServer -}}
- ports:
    - {protocol: TCP, port: {{ $api.port | toJson }}}
    {{- if ne (int $api.port) 6443 }}
    # The Service's port is translated before policies apply.
    - {protocol: TCP, port: 6443}
    {{- end }}
  to:
    {{- range $api.cidrs }}
    - ipBlock: {cidr: {{ . | toJson }}}
    {{- end }}
{{- end -}}
