{{/* (dict "context" . "component" "serving"): pods of the chart as a peer. */}}
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

{{/* The API server is no pod: only addresses name it. */}}
{{- define "reelway.apiServerEgress" -}}
{{- $api := .Values.networkPolicies.apiServer -}}
- ports:
    - {protocol: TCP, port: {{ $api.port }}}
    {{- if ne (int $api.port) 6443 }}
    # A Service's port is rewritten before a policy looks.
    - {protocol: TCP, port: 6443}
    {{- end }}
  {{- with $api.cidrs }}
  to:
    {{- range . }}
    - ipBlock: {cidr: {{ . }}}
    {{- end }}
  {{- end }}
{{- end -}}
