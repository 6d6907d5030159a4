{{/* Ports of a Ray pod. Only the ranges are values; the fixed ports are private to the pod network. */}}
{{- define "reelway.rayPorts" -}}
{{- $ranges := .Values.ray.ports -}}
gcs: 6379
dashboard: 8265
client: 10001
nodeManager: 6380
objectManager: 6381
runtimeEnvAgent: 6382
agentGrpc: 6383
agentHttp: 52365
metrics: 8080
workerMin: {{ $ranges.workerMin | toJson }}
workerMax: {{ $ranges.workerMax | toJson }}
ingressMin: {{ $ranges.ingressMin | toJson }}
ingressMax: {{ $ranges.ingressMax | toJson }}
# HAProxy reaches each replica over HTTP; Ray reserves a gRPC port for it too.
ingressGrpcMin: {{ add $ranges.ingressMin 10000 }}
ingressGrpcMax: {{ add $ranges.ingressMax 10000 }}
{{- end -}}

{{/* The worker groups. `helm upgrade --reuse-values` passes a group that values removed (`cpu: null`) as null. */}}
{{- define "reelway.workers" -}}
{{- range $name, $group := .Values.serving.workers }}
{{- if $group }}
{{ $name }}: {{- toYaml $group | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Options of `ray start`. (dict "context" . "role" "head" "group" dict) */}}
{{- define "reelway.rayStart" -}}
{{- $p := include "reelway.rayPorts" .context | fromYaml -}}
node-manager-port: {{ $p.nodeManager | quote }}
object-manager-port: {{ $p.objectManager | quote }}
runtime-env-agent-port: {{ $p.runtimeEnvAgent | quote }}
dashboard-agent-grpc-port: {{ $p.agentGrpc | quote }}
dashboard-agent-listen-port: {{ $p.agentHttp | quote }}
metrics-export-port: {{ $p.metrics | quote }}
min-worker-port: {{ $p.workerMin | quote }}
max-worker-port: {{ $p.workerMax | quote }}
{{- if eq .role "head" }}
port: {{ $p.gcs | quote }}
dashboard-host: {{ include "reelway.dashboardHost" .context | quote }}
dashboard-port: {{ $p.dashboard | quote }}
ray-client-server-port: {{ $p.client | quote }}
num-cpus: {{ .context.Values.serving.head.cpus | quote }}
{{- else }}
num-cpus: {{ include "reelway.quantity" .group.resources.requests.cpu | float64 | floor | int | max 1 | quote }}
{{- end }}
{{- if and .group .group.gpus }}
num-gpus: {{ .group.gpus | quote }}
{{- end }}
{{- end -}}

{{/* Low-latency settings. serving/serve_settings.py explains each one; a test compares the two lists. */}}
{{- define "reelway.serveSettings" -}}
RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD: "0"
RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP: "0"
RAY_SERVE_USE_GRPC_BY_DEFAULT: "1"
RAY_SERVE_ENABLE_HA_PROXY: "1"
RAY_SERVE_HAPROXY_METRICS_ENABLED: "0"
RAY_SERVE_HAPROXY_BALANCE_ALGORITHM: "leastconn\n    option http-buffer-request\n    timeout http-request 5s\n    option forwardfor\n    http-error status 400 content-type application/json string '{\"error\":\"the request is not valid HTTP/1.1\",\"fields\":[]}'\n    http-error status 408 content-type application/json string '{\"error\":\"the request did not arrive in time; send it whole, within a few seconds\",\"fields\":[]}'\n    http-error status 502 content-type application/json string '{\"error\":\"the service did not answer; try again\",\"fields\":[]}' hdr Retry-After 1\n    http-error status 503 content-type application/json string '{\"error\":\"no replica of the service is ready; try again\",\"fields\":[]}' hdr Retry-After 1\n    http-error status 504 content-type application/json string '{\"error\":\"the service did not answer in time; try again\",\"fields\":[]}' hdr Retry-After 1"
RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S: "10"
RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S: "3"
RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S: "1"
RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S: "60"
RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE: "1000"
RAY_SERVE_FREEZE_GC_ON_STARTUP: "1"
RAY_SERVE_LOG_TO_STDERR: "0"
RAY_worker_niceness: "0"
{{- end -}}

{{- define "reelway.rayEnv" -}}
{{- $p := include "reelway.rayPorts" . | fromYaml -}}
{{- $env := include "reelway.serveSettings" . | fromYaml -}}
{{- $own := dict "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT" $p.ingressMin "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT" $p.ingressMax -}}
{{- $grpc := dict "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT" $p.ingressGrpcMin "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT" $p.ingressGrpcMax -}}
{{- /* A worker checks every 60 s by default whether it is registered at the head. An unregistered worker gets no requests from a new head. */ -}}
{{- $node := dict "RAY_raylet_liveness_self_check_interval_ms" "2000" -}}
{{- /* 30 s as in Ray, or what the grace period leaves after preStop (5 s) and before the processes exit (5 s). */ -}}
{{- $drain := dict "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" (min 30 (sub (int .Values.serving.terminationGracePeriodSeconds) 10)) -}}
{{- $quiet := dict "RAY_USAGE_STATS_ENABLED" "0" "FEAST_USAGE" "False" "OMP_NUM_THREADS" "1" "RAY_AUTH_MODE" "token" -}}
{{- range $name, $value := mergeOverwrite $env $own $grpc $node $drain $quiet (.Values.serving.env | default dict) }}
- {name: {{ $name | toJson }}, value: {{ include "reelway.text" $value | quote }}}
{{- end }}
- name: RAY_AUTH_TOKEN
  valueFrom: {{- include "reelway.secretKey" (dict "context" . "key" "auth_token") | nindent 4 }}
- name: REELWAY_TOKEN_SECRET
  valueFrom: {{- include "reelway.secretKey" (dict "context" . "key" "impression-tokens") | nindent 4 }}
{{- include "reelway.redisEnv" . }}
{{- include "reelway.kafkaEnv" . }}
{{- include "reelway.rayTlsEnv" . }}
{{- include "reelway.storeEnv" . }}
{{- end -}}

{{/*
Folders of the release store's volume that serving pods write: the viewers' memory beside SQLite features, samples for the
parity replay, and the requests for overlays. All other folders are read-only.
*/}}
{{- define "reelway.servingFolders" -}}
{{- $root := "/var/lib/reelway/volume/" -}}
{{- $written := list -}}
{{- if eq (include "reelway.storeOnVolume" .) "true" -}}
{{- if eq .Values.features.type "directory" }}{{ $written = append $written .Values.features.directory }}{{ end -}}
{{- if include "reelway.parityEnabled" . }}{{ $written = append $written (include "reelway.vectorLog" .) }}{{ end -}}
{{- if include "reelway.live" . }}{{ $written = append $written (include "reelway.overlayUrl" .) }}{{ end -}}
{{- end -}}
{{- $folders := list -}}
{{- range $written }}{{ if not (contains "://" .) }}{{ $folders = append $folders (trimPrefix $root . | trimSuffix "/") }}{{ end }}{{ end -}}
{{- uniq $folders | toYaml -}}
{{- end -}}

{{- define "reelway.rayMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /var/cache/reelway}
- {name: metrics, mountPath: /var/run/reelway/metrics}
- {name: public-keys, mountPath: /etc/reelway/public-keys, readOnly: true}
{{- if eq (include "reelway.storeOnVolume" .context) "true" }}
- {name: releases, mountPath: /var/lib/reelway/volume, readOnly: true}
{{- range include "reelway.servingFolders" .context | fromYamlArray }}
- {name: releases, mountPath: /var/lib/reelway/volume/{{ . }}, subPath: {{ . }}}
{{- end }}
{{- end }}
{{- if eq .context.Values.features.type "redis" }}
- {name: features, mountPath: /etc/reelway/features, readOnly: true}
{{- end }}
{{- include "reelway.tlsMounts" (dict "context" .context "hops" (list "redis" "kafka")) }}
{{- include "reelway.rayTlsMounts" .context }}
{{- if include "reelway.accessKeys" .context }}
- {name: access, mountPath: /etc/reelway/access, readOnly: true}
{{- end }}
{{- if eq .role "head" }}
- {name: state, mountPath: /var/lib/reelway/state}
{{- end }}
{{- end -}}

{{- define "reelway.rayVolumes" -}}
{{- $v := .context.Values -}}
- {name: tmp, emptyDir: {}}
- {name: cache, emptyDir: {sizeLimit: {{ $v.serving.releaseCache.size | toJson }}}}
- {name: metrics, emptyDir: {medium: Memory, sizeLimit: 256Mi}}
{{ include "reelway.publicKeysVolume" .context }}
{{- if eq (include "reelway.storeOnVolume" .context) "true" }}
- {name: releases, persistentVolumeClaim: {claimName: {{ include "reelway.storeClaim" .context | quote }}}}
{{- end }}
{{- if eq $v.features.type "redis" }}
- {name: features, configMap: {name: {{ include "reelway.fullname" .context }}-features}}
{{- end }}
{{- include "reelway.tlsVolumes" (dict "context" .context "hops" (list "redis" "kafka")) }}
{{- include "reelway.rayTlsVolumes" .context }}
{{- with include "reelway.accessKeys" .context }}
- name: access
  projected:
    sources: {{- . | nindent 6 }}
{{- end }}
{{- if eq .role "head" }}
- name: state
{{- if and $v.serving.outcomes.enabled $v.serving.outcomes.persistence.enabled }}
  persistentVolumeClaim: {claimName: {{ include "reelway.stateClaim" .context | quote }}}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}
{{- end -}}

{{- define "reelway.stateClaim" -}}
{{- .Values.serving.outcomes.persistence.existingClaim | default (printf "%s-outcomes" (include "reelway.fullname" .)) -}}
{{- end -}}

{{/* Probes of a Ray node at its agent's port. KubeRay's default probe starts after 10 s and repeats every 5 s, which delays
     every new head and job by that much. */}}
{{- define "reelway.rayNodeProbes" -}}
startupProbe:
  httpGet: {path: /api/healthz, port: {{ . | toJson }}}
  periodSeconds: 1
  timeoutSeconds: 5
  failureThreshold: 300
readinessProbe:
  httpGet: {path: /api/healthz, port: {{ . | toJson }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 10
{{- end -}}

{{/* The Ray container without its command. (dict "context" . "role" "head" "group" dict) */}}
{{- define "reelway.rayContainer" -}}
{{- $v := .context.Values -}}
{{- $p := include "reelway.rayPorts" .context | fromYaml -}}
name: ray
image: {{ include "reelway.image" (dict "context" .context "of" $v.image.serving) | quote }}
imagePullPolicy: {{ $v.image.pullPolicy | toJson }}
securityContext: {{- include "reelway.containerSecurity" .context | nindent 2 }}
env:
  {{- include "reelway.rayEnv" .context | nindent 2 }}
ports:
  - {name: serve, containerPort: {{ $v.serving.port | toJson }}}
  # KubeRay adds a port of this name with the number 8080 if it is missing.
  - {name: metrics, containerPort: {{ $p.metrics | toJson }}}
  {{- if eq .role "head" }}
  - {name: gcs-server, containerPort: {{ $p.gcs | toJson }}}
  - {name: dashboard, containerPort: {{ $p.dashboard | toJson }}}
  - {name: client, containerPort: {{ $p.client | toJson }}}
  # The container `metrics` listens on it. KubeRay adds the ports of this container to the head's Service.
  - {name: internal, containerPort: {{ $v.serving.internalPort | toJson }}}
  {{- end }}
{{- if eq .role "worker" }}
# A worker is ready once its proxy routes to a replica.
readinessProbe:
  httpGet: {path: /-/healthz, port: {{ $v.serving.port | toJson }}}
  initialDelaySeconds: 5
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 3
{{- else }}
{{ include "reelway.rayNodeProbes" $p.agentHttp }}
{{- end }}
lifecycle:
  # Services and proxies stop routing to the pod before its processes stop.
  preStop: {exec: {command: [/bin/sh, -c, sleep 5]}}
resources:
  requests:
    {{- toYaml .group.resources.requests | nindent 4 }}
    {{- if .group.gpus }}
    {{ .group.gpuResource }}: {{ .group.gpus }}
    {{- end }}
  limits:
    {{- toYaml .group.resources.limits | nindent 4 }}
    {{- if .group.gpus }}
    {{ .group.gpuResource }}: {{ .group.gpus }}
    {{- end }}
volumeMounts:
  {{- include "reelway.rayMounts" . | nindent 2 }}
{{- end -}}

{{/* Exports the metrics of this pod. A scrape through Ray's proxy would reach the router of any node. In the head's pod
     it also serves the internal API. (dict "context" . "role" "head") */}}
{{- define "reelway.metricsContainer" -}}
{{- $v := .context.Values -}}
name: metrics
image: {{ include "reelway.image" (dict "context" .context "of" $v.image.serving) | quote }}
imagePullPolicy: {{ $v.image.pullPolicy | toJson }}
command: [python, -m, reelway.serving.pod_metrics, --port, {{ $v.serving.metrics.port | quote }}]
{{- if eq .role "head" }}
args: [--internal-port, {{ $v.serving.internalPort | quote }}, --service-url, "http://localhost:{{ $v.serving.port }}"]
{{- end }}
securityContext: {{- include "reelway.containerSecurity" .context | nindent 2 }}
env:
  - {name: PROMETHEUS_MULTIPROC_DIR, value: /var/run/reelway/metrics}
  {{- if eq .role "head" }}
  - name: REELWAY_TOKEN_SECRET
    valueFrom: {{- include "reelway.secretKey" (dict "context" .context "key" "impression-tokens") | nindent 6 }}
  {{- end }}
ports:
  - {name: reelway-metrics, containerPort: {{ $v.serving.metrics.port | toJson }}}
resources: {{- toYaml $v.serving.metrics.resources | nindent 2 }}
volumeMounts:
  - {name: metrics, mountPath: /var/run/reelway/metrics}
  - {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "reelway.rayPodLabels" -}}
{{ include "reelway.podLabels" (dict "context" .context "component" "serving") }}
reelway.dev/role: {{ .role | toJson }}
{{- end -}}

{{/* The spec of a Ray pod without its containers. */}}
{{- define "reelway.rayPodSpec" -}}
{{- $v := .context.Values -}}
serviceAccountName: {{ include "reelway.fullname" .context }}-serving
automountServiceAccountToken: {{ and $v.ray.autoscaling.enabled (eq .role "head") }}
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $v.serving.terminationGracePeriodSeconds | toJson }}
securityContext: {{- include "reelway.podSecurity" .context | nindent 2 }}
{{- include "reelway.pullSecrets" .context }}
{{- with include "reelway.servingPriority" .context }}
priorityClassName: {{ . | toJson }}
{{- end }}
{{- include "reelway.scheduling" (dict "of" .group) }}
volumes:
  {{- include "reelway.rayVolumes" . | nindent 2 }}
{{- include "reelway.rayTlsInit" (dict "context" .context "image" $v.image.serving) }}
{{- with include "reelway.servingFolders" .context | fromYamlArray }}
{{- if not $.context.Values.ray.tls.caSecret }}
initContainers:
{{- end }}
  # The kubelet would create the folders of `subPath` for root.
  - name: folders
    image: {{ include "reelway.image" (dict "context" $.context "of" $v.image.serving) }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    command: [mkdir, -p]
    args:
      {{- range . }}
      - /var/lib/reelway/volume/{{ . }}
      {{- end }}
    securityContext: {{- include "reelway.containerSecurity" $.context | nindent 6 }}
    resources: {{- toYaml $v.serving.metrics.resources | nindent 6 }}
    volumeMounts:
      - {name: releases, mountPath: /var/lib/reelway/volume}
{{- end }}
{{- end -}}

{{- define "reelway.servingPriority" -}}
{{- if .Values.serving.priorityClassName }}{{ .Values.serving.priorityClassName }}
{{- else if .Values.priorityClasses.create }}{{ include "reelway.fullname" . }}-serving{{ end -}}
{{- end -}}
