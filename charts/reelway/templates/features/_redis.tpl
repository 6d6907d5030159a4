{{- define "reelway.redisHost" -}}
{{- if eq .Values.features.redis.mode "bundled" }}{{ include "reelway.fullname" . }}-redis{{ else }}{{ .Values.features.redis.host }}{{ end -}}
{{- end -}}
{{- define "reelway.redisBundled" -}}
{{- if and (eq .Values.features.type "redis") (eq .Values.features.redis.mode "bundled") }}true{{ end -}}
{{- end -}}
{{/* Address without a password, as REELWAY_ONLINE_STORE has it. An IPv6 host gets brackets. */}}
{{- define "reelway.redisAddress" -}}
{{- $r := .Values.features.redis -}}
{{- $host := include "reelway.redisHost" . | trimPrefix "[" | trimSuffix "]" -}}
{{- if contains ":" $host }}{{ $host = printf "[%s]" $host }}{{ end -}}
{{- printf "%s://%s:%v/0" (ternary "rediss" "redis" $r.tls) $host (int $r.port) -}}
{{- end -}}
