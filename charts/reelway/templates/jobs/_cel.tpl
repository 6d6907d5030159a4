{{/* A value as a CEL literal. `dyn` permits elements of different types in a list or a map. */}}
{{- define "reelway.cel" -}}
{{- if kindIs "map" . -}}
dyn({ {{- range $key, $value := . }}{{ toJson $key }}: {{ include "reelway.cel" $value }}, {{ end -}} })
{{- else if kindIs "slice" . -}}
dyn([ {{- range . }}{{ include "reelway.cel" . }}, {{ end -}} ])
{{- else -}}
dyn({{ toJson . }})
{{- end -}}
{{- end -}}

{{/* CEL: the keys in which a map differs from the wanted one. (dict "found" "a" "wanted" "b" "free" (list "c")) */}}
{{- define "reelway.celDifferences" -}}
{{- $free := .free | default list | toJson -}}
({{ .found }}.filter(k, !(k in {{ $free }}) && !(k in {{ .wanted }} && {{ .found }}[k] == {{ .wanted }}[k])) + {{ .wanted }}.filter(k, !(k in {{ $free }}) && !(k in {{ .found }})))
{{- end -}}

{{/* Regular expressions of jobs.allowedImages, in which `*` stands for any characters but `/`. */}}
{{- define "reelway.allowedImages" -}}
{{- $patterns := list -}}
{{- range .Values.jobs.allowedImages }}
{{- $patterns = append $patterns (printf "^%s$" (. | regexQuoteMeta | replace "\\*" "[^/]*")) }}
{{- end -}}
{{- $patterns | toJson -}}
{{- end -}}

{{/*
What the policy compares a RayJob of one kind with: the template, and the command line that a job's must begin with.
(dict "context" . "kind" "train")
*/}}
{{- define "reelway.wantedJob" -}}
{{- $job := mergeOverwrite (deepCopy .context.Values.jobs.defaults) (get .context.Values.jobs .kind) -}}
{{- $template := include "reelway.rayJob" . | fromYaml -}}
{{- dict "name" $template.metadata.generateName "labels" $template.metadata.labels "spec" $template.spec "command" (include "reelway.shellWords" $job.command) | toJson -}}
{{- end -}}
