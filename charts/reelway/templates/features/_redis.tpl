{{- define "reelway.redisHost" -}}
{{- if eq .Values.features.redis.mode "bundled" }}{{ include "reelway.fullname" . }}-redis{{ else }}{{ .Values.features.redis.host }}{{ end -}}
{{- end -}}
{{- define "reelway.redisBundled" -}}
{{- if and (eq .Values.features.type "redis") (eq .Values.features.redis.mode "bundled") }}true{{ end -}}
{{- end -}}
