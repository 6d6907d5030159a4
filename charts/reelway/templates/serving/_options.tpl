{{/*
Options of the service, for `reelway.platform.rollout.traffic.serving_options`. The operator composes Ray Serve's
configuration from them; the chart renders neither releases nor routing, except for the very first release.
*/}}
{{- define "reelway.servingOptions" -}}
{{- $s := .Values.serving -}}
releases:
  release_store: {{ include "reelway.storeUrl" . | quote }}
  release_cache: /var/cache/reelway/releases
  public_keys: /etc/reelway/public-keys
  overlay: {{ if include "reelway.live" . }}{{ include "reelway.overlayUrl" . | quote }}{{ else }}null{{ end }}
initial:
  release: {{ .Values.releases.initial | quote }}
  salt: {{ $s.bucketSalt | quote }}
metrics_dir: /var/run/reelway/metrics
features_dir: {{ include "reelway.featuresFolder" . | default "null" }}
vector_log: {{ if include "reelway.parityEnabled" . }}{{ include "reelway.vectorLog" . | quote }}{{ else }}null{{ end }}
parity_ratio: {{ $s.parity.ratio | toJson }}
outcomes: {{ if $s.outcomes.enabled }}{{ include "reelway.outcomesFolder" . }}/outcomes.db{{ else }}null{{ end }}
events: {{ .Values.eventLog.address | default nil | toJson }}
host: {{ include "reelway.serveHost" . | quote }}
port: {{ $s.port | toJson }}
composition: staged
max_ongoing_requests: {{ $s.queue.maxOngoingRequests | toJson }}
max_ongoing_sustained: {{ $s.queue.maxOngoingSustained | toJson }}
ranker_address: {{ if include "reelway.kserveEnabled" . }}{{ include "reelway.rankerAddress" . | trim | quote }}{{ else }}null{{ end }}
budgets:
  viewer_row: {{ $s.budgetsMs.viewerRow | toJson }}
  retrieval: {{ $s.budgetsMs.retrieval | toJson }}
  ranking: {{ $s.budgetsMs.ranking | toJson }}
  reranking: {{ $s.budgetsMs.reranking | toJson }}
deployments:
  {{- range $name := list "router" "retrieval" "ranking" "reranking" }}
  {{- $deployment := get $s.deployments $name }}
  {{ $name }}:
    num_replicas: {{ $deployment.replicas | toJson }}
    num_cpus: {{ $deployment.cpus | toJson }}
    num_gpus: {{ $deployment.gpus | toJson }}
    memory_bytes: {{ mul (int64 $deployment.memoryMiB) 1048576 }}
    {{- with $deployment.autoscaling }}
    {{- if .enabled }}
    autoscaling: {min_replicas: {{ .min | toJson }}, max_replicas: {{ .max | toJson }}, target_ongoing_requests: {{ .ongoingRequests | toJson }}}
    {{- end }}
    {{- end }}
  {{- end }}
  {{- if include "reelway.outcomesOnHead" . }}
  # The file of the sums is on the head, the only pod with this resource.
  outcomes: {num_replicas: 1, num_cpus: 0, resources: {reelway_state: 0.01}}
  {{- else }}
  outcomes: {num_replicas: 1, num_cpus: 0}
  {{- end }}
{{- end -}}

{{/* Whether the sums of outcomes need the head's volume: they are kept in a claim, or their event log is a folder there. */}}
{{- define "reelway.outcomesOnHead" -}}
{{- if or .Values.serving.outcomes.persistence.enabled (not .Values.eventLog.address) }}true{{ end -}}
{{- end -}}

{{- define "reelway.outcomesFolder" -}}
{{- if include "reelway.outcomesOnHead" . }}/var/lib/reelway/state{{ else }}/var/cache/reelway/outcomes{{ end -}}
{{- end -}}

{{- define "reelway.featuresFolder" -}}
{{- if eq .Values.features.type "directory" }}/var/lib/reelway/volume/{{ .Values.features.directory }}
{{- else if eq .Values.features.type "redis" }}/etc/reelway/features{{ end -}}
{{- end -}}
