{{/* Arguments of `reelway operator`, which fills in the names in single braces. */}}
{{- define "reelway.operatorArgs" -}}
{{- $v := .Values -}}
- operator
- --namespace={{ .Release.Namespace }}
- --lease={{ include "reelway.fullname" . }}-operator
- --host=0.0.0.0
- --port={{ $v.operator.port }}
- --webhook-token-file=/etc/reelway/tokens/webhook
- --ray-token-file=/etc/reelway/tokens/ray
- --interval={{ $v.operator.intervalSeconds }}
- --releases={{ include "reelway.storeUrl" . }}
- --parity={{ include "reelway.parityReport" . }}
{{- if $v.serving.enabled }}
- --ray-service={{ include "reelway.fullname" . }}
{{- end }}
- --head-url=http://{name}-head-svc.{namespace}.svc:8265
- --router-url=http://{name}-router.{namespace}.svc:{{ $v.serving.port }}
{{- if include "reelway.kserveEnabled" . }}
- --ranker-template=/etc/reelway/ranker/inference-service.yaml
{{- end }}
{{- with $v.operator.prometheusUrl }}
- --prometheus={{ . }}
{{- end }}
{{- with $v.operator.alertmanagerUrl }}
- --alertmanager={{ . }}
{{- end }}
{{- range $name, $value := $v.operator.prometheusAccess.labels }}
- --prometheus-label={{ $name }}={{ $value }}
{{- end }}
{{- range $who := list "prometheus" "alertmanager" }}
{{- $access := index $v.operator (printf "%sAccess" $who) }}
{{- if $access.tokenSecret }}
- --{{ $who }}-token-file=/etc/reelway/monitoring/{{ $who }}.token
{{- end }}
{{- if $access.caConfigMap }}
- --{{ $who }}-ca-file=/etc/reelway/monitoring/{{ $who }}.ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{/* Tokens and certificates for Prometheus and Alertmanager in one projected volume; empty if none is needed. */}}
{{- define "reelway.monitoringAccess" -}}
{{- $v := .Values -}}
{{- range $who := list "prometheus" "alertmanager" }}
{{- $access := index $v.operator (printf "%sAccess" $who) }}
{{- with $access.tokenSecret }}
- secret: {name: {{ . }}, items: [{key: token, path: {{ $who }}.token}]}
{{- end }}
{{- with $access.caConfigMap }}
- configMap: {name: {{ . }}, items: [{key: ca.crt, path: {{ $who }}.ca.crt}]}
{{- end }}
{{- end }}
{{- end -}}
