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
composition: {{ $s.composition | quote }}
access:
  {{- include "reelway.accessOptions" . | nindent 2 }}
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

{{/* YAML reads an unquoted off as false. */}}
{{- define "reelway.authMode" -}}
{{- ternary .Values.auth.mode "off" (kindIs "string" .Values.auth.mode) -}}
{{- end -}}

{{- define "reelway.accessOptions" -}}
{{- $a := .Values.auth -}}
mode: {{ include "reelway.authMode" . | quote }}
{{- if eq (include "reelway.authMode" .) "jwt" }}
jwt:
  audience: {{ $a.jwt.audience | quote }}
  issuer: {{ $a.jwt.issuer | default nil | toJson }}
  jwks_url: {{ $a.jwt.jwksUrl | default nil | toJson }}
  keys_file: {{ ternary "/etc/reelway/access/keys" nil (not (empty $a.jwt.keysConfigMap)) | toJson }}
  ca_file: {{ ternary "/etc/reelway/access/ca.crt" nil (not (empty $a.jwt.caConfigMap)) | toJson }}
  viewer_claim: {{ $a.jwt.viewerClaim | quote }}
  algorithms: {{ $a.jwt.algorithms | toJson }}
{{- end }}
{{- if eq (include "reelway.authMode" .) "gateway" }}
gateway:
  keys_file: /etc/reelway/access/keys
  max_age_s: {{ $a.gateway.maxAgeSeconds | toJson }}
{{- end }}
per_viewer: {per_second: {{ $a.perViewer.requestsPerSecond | toJson }}, burst: {{ int64 $a.perViewer.burst }}}
per_address: {per_second: {{ $a.perAddress.requestsPerSecond | toJson }}, burst: {{ int64 $a.perAddress.burst }}}
trusted_proxies: {{ $a.trustedProxies | toJson }}
unlimited_networks: {{ concat (list "127.0.0.0/8" "::1/128") ($a.unlimitedCidrs | default list) | toJson }}
{{- end -}}

{{/* Volume sources of the keys that proofs are verified with; empty if there is none. */}}
{{- define "reelway.accessKeys" -}}
{{- $a := .Values.auth -}}
{{- if eq (include "reelway.authMode" .) "jwt" }}
{{- with $a.jwt.keysConfigMap }}
- configMap: {name: {{ . | toJson }}, items: [{key: keys, path: keys}]}
{{- end }}
{{- with $a.jwt.caConfigMap }}
- configMap: {name: {{ . | toJson }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- else if eq (include "reelway.authMode" .) "gateway" }}
- secret: {name: {{ $a.gateway.keysSecret | toJson }}, items: [{key: keys, path: keys}]}
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
