{{/*
Rules whose alerts say where they belong: an AlertmanagerConfig is only shown alerts of its own namespace, and sums over
pods have lost that label. (dict "context" . "rules" dict)
*/}}
{{- define "reelway.rulesOfNamespace" -}}
{{- $namespace := .context.Release.Namespace -}}
{{- range .rules.groups }}
{{- range .rules }}
{{- if .alert }}{{ $_ := set . "labels" (merge (dict "namespace" $namespace) (.labels | default dict)) }}{{ end }}
{{- end }}
{{- end }}
{{- toYaml .rules }}
{{- end -}}
