{{/* Settings file of `reelway operator`, which fills in the names in single braces. Secrets are paths of mounted files. */}}
{{- define "reelway.operatorSettings" -}}
{{- $v := .Values -}}
interval_s: {{ $v.operator.intervalSeconds | toJson }}
webhook:
  port: {{ $v.operator.port | toJson }}
  token_file: /etc/reelway/tokens/webhook
  {{- if $v.operator.webhookTls.secret }}
  cert_file: /etc/reelway/tls/webhook/tls.crt
  key_file: /etc/reelway/tls/webhook/tls.key
  {{- end }}
lease:
  name: {{ include "reelway.fullname" . }}-operator
ray:
  token_file: /etc/reelway/tokens/ray
  {{- if $v.serving.enabled }}
  service: {{ include "reelway.fullname" . | quote }}
  {{- end }}
  dashboard_url: http://{name}-head-svc.{namespace}.svc:8265
  internal_url: http://{name}-head-svc.{namespace}.svc:{{ $v.serving.internalPort }}
release_store: {{ include "reelway.storeUrl" . | quote }}
public_keys: /etc/reelway/public-keys
# null: nothing is replayed, so the default policy does not require parity.
parity_findings: {{ if include "reelway.parityEnabled" . }}{{ include "reelway.parityReport" . | quote }}{{ else }}null{{ end }}
{{- if include "reelway.kserveEnabled" . }}
ranker_template: /etc/reelway/ranker/inference-service.yaml
{{- end }}
prometheus:
  {{- include "reelway.operatorSource" (dict "name" "prometheus" "url" $v.operator.prometheusUrl "access" $v.operator.prometheusAccess) | nindent 2 }}
  labels: {{- toYaml ($v.operator.prometheusAccess.labels | default dict) | nindent 4 }}
alertmanager:
  {{- include "reelway.operatorSource" (dict "name" "alertmanager" "url" $v.operator.alertmanagerUrl "access" $v.operator.alertmanagerAccess) | nindent 2 }}
{{- end -}}

{{/* Scheme of the operator's port, which is also the one of its probes. */}}
{{- define "reelway.webhookScheme" -}}
{{- if .Values.operator.webhookTls.secret }}HTTPS{{ else }}HTTP{{ end -}}
{{- end -}}

{{/* How Prometheus and Alertmanager verify the operator's certificate; empty without one. */}}
{{- define "reelway.webhookTlsConfig" -}}
{{- with .Values.operator.webhookTls.secret -}}
ca: {secret: {name: {{ . | toJson }}, key: ca.crt}}
serverName: {{ include "reelway.fullname" $ }}-operator.{{ $.Release.Namespace }}.svc
{{- end -}}
{{- end -}}

{{/* URL and credentials of Prometheus or Alertmanager. null selects the operator's default. */}}
{{- define "reelway.operatorSource" -}}
url: {{ .url | default nil | toJson }}
token_file: {{ ternary (printf "/etc/reelway/monitoring/%s.token" .name) nil (not (empty .access.tokenSecret)) | toJson }}
ca_file: {{ ternary (printf "/etc/reelway/monitoring/%s.ca.crt" .name) nil (not (empty .access.caConfigMap)) | toJson }}
cert_file: {{ ternary (printf "/etc/reelway/monitoring/%s.tls.crt" .name) nil (not (empty .access.clientSecret)) | toJson }}
key_file: {{ ternary (printf "/etc/reelway/monitoring/%s.tls.key" .name) nil (not (empty .access.clientSecret)) | toJson }}
server_name: {{ .access.serverName | default "" | quote }}
{{- end -}}

{{/* Volume sources of the credentials for Prometheus and Alertmanager; empty if both need none. */}}
{{- define "reelway.monitoringAccess" -}}
{{- $v := .Values -}}
{{- range $name := list "prometheus" "alertmanager" }}
{{- $access := index $v.operator (printf "%sAccess" $name) }}
{{- with $access.tokenSecret }}
- secret: {name: {{ . | toJson }}, items: [{key: token, path: {{ $name }}.token}]}
{{- end }}
{{- with $access.caConfigMap }}
- configMap: {name: {{ . | toJson }}, items: [{key: ca.crt, path: {{ $name }}.ca.crt}]}
{{- end }}
{{- with $access.clientSecret }}
- secret: {name: {{ . }}, items: [{key: tls.crt, path: {{ $name }}.tls.crt}, {key: tls.key, path: {{ $name }}.tls.key}]}
{{- end }}
{{- end }}
{{- end -}}
