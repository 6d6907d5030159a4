{{/*
One Prometheus holds many namespaces, and the same release may be a canary in two of them: rules look at the series of
their own namespace only, and say on what they record and fire which one it is. (An AlertmanagerConfig is only shown
alerts of its own namespace, too.) (dict "context" . "rules" dict "interval" "5s": of every group where it is given)
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

{{/* Every series that an expression names, of one namespace. (dict "namespace" "reelway" "expr" "up{...}") */}}
{{- define "reelway.ofNamespace" -}}
{{- $matcher := printf "namespace=%q" .namespace -}}
{{- $expr := regexReplaceAll `\b(reelway[_:][a-zA-Z0-9_:]+|up)\{` .expr (printf "${1}{%s, " $matcher) -}}
{{- regexReplaceAll `\b(reelway[_:][a-zA-Z0-9_:]+)([^a-zA-Z0-9_:{]|$)` $expr (printf "${1}{%s}${2}" $matcher) -}}
{{- end -}}
