{{/* Settings file of `reelway operator`, which fills in the names in single braces. Secrets are paths of mounted files. */}}
{{- define "reelway.operatorSettings" -}}
{{- $v := .Values -}}
interval_s: {{ $v.operator.intervalSeconds }}
webhook:
  host: 0.0.0.0
  port: {{ $v.operator.port }}
  token_file: /etc/reelway/tokens/webhook
lease:
  name: {{ include "reelway.fullname" . }}-operator
ray:
  token_file: /etc/reelway/tokens/ray
  {{- if $v.serving.enabled }}
  service: {{ include "reelway.fullname" . }}
  {{- end }}
  dashboard_url: http://{name}-head-svc.{namespace}.svc:8265
  router_url: http://{name}-router.{namespace}.svc:{{ $v.serving.port }}
release_store: {{ include "reelway.storeUrl" . | quote }}
public_keys: /etc/reelway/public-keys
# null: nothing is replayed, so the default policy does not require parity.
parity_findings: {{ if include "reelway.parityEnabled" . }}{{ include "reelway.parityReport" . | quote }}{{ else }}null{{ end }}
{{- if include "reelway.kserveEnabled" . }}
ranker_template: /etc/reelway/ranker/inference-service.yaml
{{- end }}
prometheus:
  {{- include "reelway.operatorSource" (dict "name" "prometheus" "url" $v.operator.prometheusUrl "access" $v.operator.prometheusAccess) | nindent 2 }}
  labels: {{- toYaml $v.operator.prometheusAccess.labels | nindent 4 }}
alertmanager:
  {{- include "reelway.operatorSource" (dict "name" "alertmanager" "url" $v.operator.alertmanagerUrl "access" $v.operator.alertmanagerAccess) | nindent 2 }}
{{- end -}}

{{/* URL and credentials of Prometheus or Alertmanager. null selects the operator's default. */}}
{{- define "reelway.operatorSource" -}}
url: {{ .url | default nil | toJson }}
token_file: {{ ternary (printf "/etc/reelway/monitoring/%s.token" .name) nil (not (empty .access.tokenSecret)) | toJson }}
ca_file: {{ ternary (printf "/etc/reelway/monitoring/%s.ca.crt" .name) nil (not (empty .access.caConfigMap)) | toJson }}
{{- end -}}

{{/* Volume sources of the credentials for Prometheus and Alertmanager; empty if both need none. */}}
{{- define "reelway.monitoringAccess" -}}
{{- $v := .Values -}}
{{- range $name := list "prometheus" "alertmanager" }}
{{- $access := index $v.operator (printf "%sAccess" $name) }}
{{- with $access.tokenSecret }}
- secret: {name: {{ . }}, items: [{key: token, path: {{ $name }}.token}]}
{{- end }}
{{- with $access.caConfigMap }}
- configMap: {name: {{ . }}, items: [{key: ca.crt, path: {{ $name }}.ca.crt}]}
{{- end }}
{{- end }}
{{- end -}}
