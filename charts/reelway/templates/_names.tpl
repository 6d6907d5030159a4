{{/*
Name of all objects, short enough for the suffixes that KubeRay appends. Names of Services begin with a letter and have no
dots; a Helm release may be named `1234` or `my.rel`.
*/}}
{{- define "reelway.fullname" -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- $own := ternary $release (printf "%s-reelway" $release) (contains "reelway" $release) -}}
{{- if not (regexMatch "^[a-z]" $own) }}{{ $own = printf "reelway-%s" $release }}{{ end -}}
{{- .Values.fullnameOverride | default $own | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* A scalar as text. Helm reads whole numbers from values as floating-point ones, which print as 1e+06. */}}
{{- define "reelway.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{/* A version as a label or an image tag, which may not contain `+`. */}}
{{- define "reelway.version" -}}
{{- . | replace "+" "_" | trunc 63 | trimSuffix "-" | trimSuffix "_" | trimSuffix "." -}}
{{- end -}}

{{/* Labels of an object. (dict "context" . "component" "serving") */}}
{{- define "reelway.labels" -}}
helm.sh/chart: {{ include "reelway.version" (printf "%s-%s" .context.Chart.Name .context.Chart.Version) | quote }}
app.kubernetes.io/version: {{ include "reelway.version" .context.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .context.Release.Service | toJson }}
app.kubernetes.io/part-of: reelway
{{ include "reelway.selector" . }}
{{- end -}}

{{/* Labels of a pod. They do not contain the chart's version, so that an upgrade restarts no pod because of a label. */}}
{{- define "reelway.podLabels" -}}
app.kubernetes.io/part-of: reelway
{{ include "reelway.selector" . }}
{{- end -}}

{{/* Selector of a component's pods. KubeRay overwrites app.kubernetes.io/name, so the selector does not use it. */}}
{{- define "reelway.selector" -}}
app.kubernetes.io/instance: {{ .context.Release.Name | toJson }}
reelway.dev/component: {{ .component | toJson }}
{{- end -}}

{{- define "reelway.routerService" -}}{{ include "reelway.fullname" . }}-router{{- end -}}
{{- define "reelway.secretName" -}}
{{- if .Values.secrets.generate }}{{ .Values.secrets.name | default (printf "%s-secrets" (include "reelway.fullname" .)) }}
{{- else }}{{ .Values.secrets.name }}{{ end -}}
{{- end -}}
{{- define "reelway.storeClaim" -}}
{{- .Values.releases.store.pvc.existingClaim | default (printf "%s-releases" (include "reelway.fullname" .)) -}}
{{- end -}}
{{- define "reelway.storeOnVolume" -}}
{{- if has .Values.releases.store.type (list "pvc" "hostPath") }}true{{ end -}}
{{- end -}}

{{/* Path or URL of the release store in pods. */}}
{{- define "reelway.storeUrl" -}}
{{- $store := .Values.releases.store -}}
{{- if eq $store.type "s3" }}s3://{{ $store.s3.bucket }}/{{ $store.path }}
{{- else if eq $store.type "gs" }}gs://{{ $store.gs.bucket }}/{{ $store.path }}
{{- else }}/var/lib/reelway/volume/{{ $store.path }}{{ end -}}
{{- end -}}

{{/*
Whether served features are logged and replayed: a run's files can be read, and viewers have features. The operator's
default policy requires parity only then.
*/}}
{{- define "reelway.parityEnabled" -}}
{{- $v := .Values -}}
{{- $run := or $v.jobs.parity.run $v.jobs.runsClaim (eq (include "reelway.storeOnVolume" .) "true") -}}
{{- if and $v.jobs.parity.enabled $v.serving.parity.ratio (ne $v.features.type "none") $run }}true{{ end -}}
{{- end -}}

{{/* Served features for the parity replay: a file per pod on the volume, else objects beside the release store. */}}
{{- define "reelway.vectorLog" -}}
{{- if .Values.serving.parity.log }}{{ .Values.serving.parity.log }}
{{- else if eq (include "reelway.storeOnVolume" .) "true" }}/var/lib/reelway/volume/parity
{{- else }}{{ include "reelway.storeUrl" . }}-vectors{{ end -}}
{{- end -}}

{{/* URL of the parity findings: written by the replay, read by the operator. */}}
{{- define "reelway.parityReport" -}}{{ include "reelway.storeUrl" . }}/parity.json{{- end -}}

{{/* Image reference. (dict "context" . "of" .Values.image.serving) */}}
{{- define "reelway.image" -}}
{{- $reference := .of.repository -}}
{{- if .context.Values.image.registry }}{{ $reference = printf "%s/%s" .context.Values.image.registry $reference }}{{ end -}}
{{- if .of.digest }}{{ $reference }}@{{ .of.digest }}
{{- else }}{{ $reference }}:{{ .of.tag | default (include "reelway.version" .context.Chart.AppVersion) }}{{ end -}}
{{- end -}}
