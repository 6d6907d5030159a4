{{/* Where the changes of video features lie; the same place for who writes and who reads them. */}}
{{- define "reelway.overlayPlace" -}}
{{- .Values.stream.overlay | default "/var/lib/reelway/volume/overlay" -}}
{{- end -}}
