{{/*
Restricts rules to the series of the installation's namespace and adds the namespace as a label. One Prometheus may store
several namespaces in which the same release is a canary, and an AlertmanagerConfig receives alerts of its own namespace
only. (dict "context" . "rules" dict "interval" "5s"); an interval applies to every group.
*/}}
{{- define "reelway.rulesOfNamespace" -}}
{{- $namespace := .context.Release.Namespace -}}
{{- $interval := .interval -}}
{{- range .rules.groups }}
{{- if $interval }}{{ $_ := set . "interval" $interval }}{{ end }}
{{- range .rules }}
{{- $_ := set . "expr" (include "reelway.ofNamespace" (dict "namespace" $namespace "expr" .expr)) }}
{{- $_ := set . "labels" (merge (dict "namespace" $namespace) (.labels | default dict)) }}
{{- end }}
{{- end }}
{{- toYaml .rules }}
{{- end -}}

{{/* Adds a namespace matcher to every series of an expression. (dict "namespace" "reelway" "expr" "up{...}") */}}
{{- define "reelway.ofNamespace" -}}
{{- $matcher := printf "namespace=%q" .namespace -}}
{{- $expr := regexReplaceAll `\b(reelway[_:][a-zA-Z0-9_:]+|up)\{` .expr (printf "${1}{%s, " $matcher) -}}
{{- regexReplaceAll `\b(reelway[_:][a-zA-Z0-9_:]+)([^a-zA-Z0-9_:{]|$)` $expr (printf "${1}{%s}${2}" $matcher) -}}
{{- end -}}
