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
- --head-url=http://{name}-head-svc.{namespace}.svc:{{ $v.ray.ports.dashboard }}
- --router-url=http://{name}-router.{namespace}.svc:{{ $v.serving.port }}
{{- with $v.controller.prometheusUrl }}
- --prometheus={{ . }}
{{- end }}
{{- with $v.controller.alertmanagerUrl }}
- --alertmanager={{ . }}
{{- end }}
{{- end -}}
