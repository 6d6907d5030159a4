{{/* An alert for the pods of each live component that runs. The other alerts cannot fire without these pods' series. */}}
{{- define "reelway.liveTargets" -}}
{{- $jobs := list }}
{{- range $component := list "stream" "overlay" "catalogue" }}
{{- if include "reelway.liveComponent" (dict "context" $ "component" $component) }}{{ $jobs = append $jobs (printf "reelway-%s" $component) }}{{ end }}
{{- end }}
{{- if $jobs }}
groups:
  - name: reelway-live-targets
    rules:
      - alert: ReelwayLivePartDown
        expr: up{job=~"{{ join "|" $jobs }}"} == 0{{ range $jobs }} or absent(up{job="{{ . }}"}){{ end }}
        for: 2m
        labels: {severity: page}
        annotations:
          summary: 'no pod, or a pod that does not answer, of {{ "{{ $labels.job }}" }}'
{{- end }}
{{- end -}}
