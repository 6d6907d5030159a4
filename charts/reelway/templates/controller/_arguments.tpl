{{/* What `reelway operator` is started with. Braces are the operator's own placeholders. */}}
{{- define "reelway.operatorArgs" -}}
{{- $v := .Values -}}
- operator
- --namespace={{ .Release.Namespace }}
- --lease={{ include "reelway.fullname" . }}-controller
- --host=0.0.0.0
- --port={{ $v.controller.port }}
- --webhook-token-file=/etc/reelway/tokens/webhook
- --ray-token-file=/etc/reelway/tokens/ray
- --interval={{ $v.controller.intervalSeconds }}
- --releases={{ include "reelway.storeUrl" . }}
- --parity={{ include "reelway.parityReport" . }}
- --head-url=http://{name}-head-svc.{namespace}.svc:{{ $v.ray.ports.dashboard }}
- --router-url=http://{name}-router.{namespace}.svc:{{ $v.serving.port }}
{{- if include "reelway.rankedByKServe" . }}
- --ranker-template=/etc/reelway/ranker/inference-service.yaml
{{- end }}
{{- with $v.controller.prometheusUrl }}
- --prometheus={{ . }}
{{- end }}
{{- with $v.controller.alertmanagerUrl }}
- --alertmanager={{ . }}
{{- end }}
{{- range $name, $value := $v.controller.prometheusAccess.labels }}
- --prometheus-label={{ $name }}={{ $value }}
{{- end }}
{{- range $who := list "prometheus" "alertmanager" }}
{{- $access := index $v.controller (printf "%sAccess" $who) }}
{{- if $access.tokenSecret }}
- --{{ $who }}-token-file=/etc/reelway/monitoring/{{ $who }}.token
{{- end }}
{{- if $access.caConfigMap }}
- --{{ $who }}-ca-file=/etc/reelway/monitoring/{{ $who }}.ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{/* What Prometheus and Alertmanager are asked with, one folder; empty where they ask for nothing. */}}
{{- define "reelway.monitoringAccess" -}}
{{- $v := .Values -}}
{{- range $who := list "prometheus" "alertmanager" }}
{{- $access := index $v.controller (printf "%sAccess" $who) }}
{{- with $access.tokenSecret }}
- secret: {name: {{ . }}, items: [{key: token, path: {{ $who }}.token}]}
{{- end }}
{{- with $access.caConfigMap }}
- configMap: {name: {{ . }}, items: [{key: ca.crt, path: {{ $who }}.ca.crt}]}
{{- end }}
{{- end }}
{{- end -}}
