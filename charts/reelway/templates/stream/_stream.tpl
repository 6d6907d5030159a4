{{/* URL of the changelog of video features: written by the stream processor, read by serving pods. */}}
{{- define "reelway.changelogUrl" -}}
{{- .Values.stream.changelog | default "/var/lib/reelway/volume/overlay" -}}
{{- end -}}
