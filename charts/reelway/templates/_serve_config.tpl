{{/* What serving/serve_config.py writes on a laptop, from values: an application per release, the router, the outcomes. */}}

{{- define "reelway.serveOptions" -}}
runtime_env:
  env_vars:
    OMP_NUM_THREADS: "1"
    PROMETHEUS_MULTIPROC_DIR: /var/run/reelway/metrics
logging_config: {log_level: WARNING, enable_access_log: false}
{{- end -}}

{{- define "reelway.releaseShelf" -}}
release_store: {{ include "reelway.storeUrl" . | quote }}
release_cache: /var/cache/reelway/releases
public_keys: /etc/reelway/public-keys
overlay: {{ if .Values.stream.enabled }}{{ include "reelway.overlayPlace" . | quote }}{{ else }}null{{ end }}
{{- end -}}

{{/* (dict "name" "Ranking" "of" .Values.serving.deployments.ranking) */}}
{{- define "reelway.deployment" -}}
name: {{ .name }}
{{- if .of.autoscaling.enabled }}
num_replicas: auto
autoscaling_config:
  min_replicas: {{ .of.autoscaling.min }}
  max_replicas: {{ .of.autoscaling.max }}
  target_ongoing_requests: {{ .of.autoscaling.ongoingRequests }}
{{- else }}
num_replicas: {{ .of.replicas }}
{{- end }}
ray_actor_options:
  num_cpus: {{ .of.cpus }}
  {{- if .of.gpus }}
  num_gpus: {{ .of.gpus }}
  {{- end }}
  {{- if .of.memoryMiB }}
  memory: {{ mul (int64 .of.memoryMiB) 1048576 }}
  {{- end }}
{{- end -}}

{{/* (dict "context" . "release" "3f9c...") */}}
{{- define "reelway.releaseApplication" -}}
{{- $d := .context.Values.serving.deployments -}}
name: {{ .release | quote }}
route_prefix: null
import_path: reelway.serving.deployments.applications:release
args:
  {{- include "reelway.releaseShelf" .context | nindent 2 }}
  release: {{ .release | quote }}
  composition: staged
  {{- if include "reelway.rankedByKServe" .context }}
  ranker_address: {{ include "reelway.rankerAddress" .context | trim | quote }}
  {{- else }}
  ranker_address: null
  {{- end }}
deployments:
  - {{- include "reelway.deployment" (dict "name" "Retrieval" "of" $d.retrieval) | nindent 4 }}
  - {{- include "reelway.deployment" (dict "name" "Ranking" "of" $d.ranking) | nindent 4 }}
  - {{- include "reelway.deployment" (dict "name" "Reranking" "of" $d.reranking) | nindent 4 }}
{{ include "reelway.serveOptions" .context }}
{{- end -}}

{{- define "reelway.outcomesApplication" -}}
name: outcomes
route_prefix: /v1/outcomes
import_path: reelway.serving.deployments.applications:outcomes
args:
  state: /var/lib/reelway/state/outcomes.db
  events: {{ if .Values.stream.enabled }}{{ .Values.stream.events | quote }}{{ else }}null{{ end }}
  token_secrets: null
deployments:
  - name: Outcomes
    num_replicas: 1
    # Its file is where the head is.
    ray_actor_options: {num_cpus: 0, resources: {reelway_state: 0.01}}
{{ include "reelway.serveOptions" . }}
{{- end -}}

{{/* (dict "context" . "routing" dict) */}}
{{- define "reelway.routerApplication" -}}
{{- $s := .context.Values.serving -}}
name: router
route_prefix: /
import_path: reelway.serving.deployments.applications:router
args:
  {{- include "reelway.releaseShelf" .context | nindent 2 }}
  token_secrets: null
  features_dir: {{ include "reelway.featuresFolder" .context | default "null" }}
  vector_log: {{ if $s.parity.ratio }}{{ include "reelway.vectorLog" .context }}{{ else }}null{{ end }}
  parity_ratio: {{ $s.parity.ratio }}
  composition: staged
  max_ongoing_requests: {{ $s.queue.atOnce }}
  max_ongoing_sustained: {{ $s.queue.standing }}
  budgets:
    viewer_row: {{ $s.budgetsMs.viewerRow }}
    retrieval: {{ $s.budgetsMs.retrieval }}
    ranking: {{ $s.budgetsMs.ranking }}
    reranking: {{ $s.budgetsMs.reranking }}
  outcomes: {{ ternary "outcomes" "null" $s.outcomes.enabled }}
deployments:
  - {{- include "reelway.deployment" (dict "name" "Router" "of" $s.deployments.router) | nindent 4 }}
    user_config: {{ toJson .routing }}
{{ include "reelway.serveOptions" .context }}
{{- end -}}

{{- define "reelway.initialRouting" -}}
{{- $arm := dict "arm" "stable" "release" .Values.releases.initial "weight_bp" 10000 -}}
{{- dict "salt" .Values.serving.salt "rollout" "" "arms" (list $arm) "shadow" nil "warm" list | toJson -}}
{{- end -}}

{{/* (dict "context" . "releases" list "routing" dict): the document as JSON. */}}
{{- define "reelway.serveDocument" -}}
{{- $context := .context -}}
{{- $applications := list -}}
{{- range .releases }}
{{- $applications = append $applications (include "reelway.releaseApplication" (dict "context" $context "release" .) | fromYaml) }}
{{- end }}
{{- if $context.Values.serving.outcomes.enabled }}
{{- $applications = append $applications (include "reelway.outcomesApplication" $context | fromYaml) }}
{{- end }}
{{- $applications = append $applications (include "reelway.routerApplication" (dict "context" $context "routing" .routing) | fromYaml) }}
{{- $http := dict "host" "0.0.0.0" "port" (int $context.Values.serving.port) -}}
{{- $logging := dict "log_level" "WARNING" "enable_access_log" false -}}
{{- dict "proxy_location" "EveryNode" "http_options" $http "logging_config" $logging "applications" $applications | toJson -}}
{{- end -}}

{{/*
The document of the RayService. Traffic belongs to the rollout operator: where a RayService runs already, its releases
and its routing are kept, and only what values say is written over. Where that changes nothing, the live text is
repeated letter by letter, so that Helm and the operator never disagree on who owns it.
*/}}
{{- define "reelway.serveConfig" -}}
{{- $releases := list .Values.releases.initial -}}
{{- $routing := include "reelway.initialRouting" . | fromJson -}}
{{- $object := lookup "ray.io/v1" "RayService" .Release.Namespace (include "reelway.fullname" .) -}}
{{- $text := dig "spec" "serveConfigV2" "" ($object | default dict) -}}
{{- $live := dict -}}
{{- if $text }}
{{- $live = fromYaml $text }}
{{- $running := list }}
{{- range $live.applications }}
{{- $name := .name }}
{{- if eq (dig "args" "release" "" .) $name }}{{ $running = append $running $name }}{{ end }}
{{- if eq $name "router" }}
{{- range .deployments }}{{ if hasKey . "user_config" }}{{ $routing = .user_config }}{{ end }}{{ end }}
{{- end }}
{{- end }}
{{- if $running }}{{ $releases = $running }}{{ end }}
{{- end }}
{{- $document := include "reelway.serveDocument" (dict "context" . "releases" $releases "routing" $routing) -}}
{{- if and $text (eq (toJson (fromJson $document)) (toJson $live)) }}{{ $text }}{{ else }}{{ $document }}{{ end -}}
{{- end -}}

{{- define "reelway.featuresFolder" -}}
{{- if eq .Values.features.type "directory" }}/var/lib/reelway/volume/{{ .Values.features.directory }}
{{- else if eq .Values.features.type "redis" }}/etc/reelway/features{{ end -}}
{{- end -}}
