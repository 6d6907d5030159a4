{{/* The RayJob of one kind. (dict "context" . "kind" "train"). CronJobs create it; `reelway submit` changes it by its flags. */}}
{{- define "reelway.rayJob" -}}
{{- $v := .context.Values -}}
{{- $job := mergeOverwrite (deepCopy $v.jobs.defaults) (get $v.jobs .kind) -}}
{{- $labels := include "reelway.labels" (dict "context" .context "component" "jobs") -}}
{{- $pod := dict "context" .context "job" $job "kind" .kind -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  generateName: {{ include "reelway.fullname" .context | trunc 20 | trimSuffix "-" }}-{{ .kind | trunc 15 }}-
  labels:
    {{- $labels | nindent 4 }}
    reelway.dev/job: {{ .kind | toJson }}
    reelway.dev/run: {{ base $v.jobs.runsPath | quote }}
    {{- with $v.jobs.kueueQueue }}
    kueue.x-k8s.io/queue-name: {{ . | toJson }}
    {{- end }}
spec:
  entrypoint: {{ include "reelway.jobEntrypoint" (dict "context" .context "job" $job "kind" .kind) | quote }}
  # The submitter's pod has the log, also after the cluster was deleted. Reading it requires no access to Ray.
  submissionMode: K8sJobMode
  submitterPodTemplate: {{- include "reelway.submitterPod" $pod | nindent 4 }}
  # Frees the GPUs. The RayJob and its log stay until they are deleted.
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: {{ $v.jobs.ttlSecondsAfterFinished | toJson }}
  activeDeadlineSeconds: {{ $job.activeDeadlineSeconds | toJson }}
  preRunningDeadlineSeconds: {{ $v.jobs.startTimeoutSeconds | toJson }}
  backoffLimit: {{ $v.jobs.backoffLimit | toJson }}
  rayClusterSpec:
    rayVersion: {{ $v.ray.version | quote }}
    # Without a Secret's name KubeRay creates a token for each job. It opens no other cluster.
    authOptions: {mode: token}
    headGroupSpec:
      rayStartParams:
        dashboard-host: {{ include "reelway.dashboardHost" .context | quote }}
        {{- if gt (int $job.workers) 0 }}
        num-cpus: "0"
        {{- end }}
      template: {{- include "reelway.rayJobPod" (merge (dict "role" "head") $pod) | nindent 8 }}
    workerGroupSpecs:
      - groupName: workers
        replicas: {{ $job.workers | toJson }}
        minReplicas: {{ $job.workers | toJson }}
        maxReplicas: {{ $job.workers | toJson }}
        rayStartParams: {}
        template: {{- include "reelway.rayJobPod" (merge (dict "role" "worker") $pod) | nindent 10 }}
{{- end -}}

{{/* The command line of a job. */}}
{{- define "reelway.jobEntrypoint" -}}
{{- $v := .context.Values -}}
{{- $workers := int .job.workers -}}
{{- $gpus := mul (int .job.gpus) (max 1 $workers) -}}
{{- $words := concat .job.command (list "--run" (printf "/var/lib/reelway/work/%s" $v.jobs.runsPath)) -}}
{{- if eq .kind "train" }}
{{- if $workers }}{{ $words = concat $words (list "--workers" $workers) }}{{ end -}}
{{- if $gpus }}{{ $words = concat $words (list "--gpus" $gpus) }}{{ end -}}
{{- end -}}
{{- if eq .kind "release" }}
{{- $words = concat $words (list "--store" (include "reelway.storeUrl" .context)) -}}
{{- if $v.jobs.signingSecret }}{{ $words = concat $words (list "--key" "/etc/reelway/signing/signing.pem") }}{{ end -}}
{{- end -}}
{{- include "reelway.shellWords" $words -}}
{{- end -}}

{{/* Words as a shell command line, quoted as by Python's shlex.join. */}}
{{- define "reelway.shellWords" -}}
{{- range $index, $word := . }}
{{- if $index }} {{ end -}}
{{- $text := toString $word -}}
{{- if regexMatch "^[A-Za-z0-9_@%+=:,./-]+$" $text }}{{ $text }}{{ else }}'{{ $text | replace "'" "'\"'\"'" }}'{{ end -}}
{{- end -}}
{{- end -}}

{{- define "reelway.rayJobPod" -}}
{{- $v := .context.Values -}}
{{- $gpus := and .job.gpus (or (eq .role "worker") (eq (int .job.workers) 0)) -}}
{{- $store := and (eq (include "reelway.storeOnVolume" .context) "true") (include "reelway.storeClaim" .context) -}}
{{- $work := $v.jobs.runsClaim | default (include "reelway.storeClaim" .context) -}}
{{- /* Ray runs a job's command on the head. */ -}}
{{- $signs := and $v.jobs.signingSecret (eq .kind "release") (eq .role "head") -}}
metadata:
  labels:
    {{- include "reelway.podLabels" (dict "context" .context "component" "jobs") | nindent 4 }}
    reelway.dev/job: {{ .kind | toJson }}
spec:
  {{- include "reelway.jobPodSpec" . | nindent 2 }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - name: work
      persistentVolumeClaim: {claimName: {{ $work | toJson }}}
    {{- if and $store (ne $store $work) }}
    - name: store
      persistentVolumeClaim: {claimName: {{ $store | toJson }}}
    {{- end }}
    {{- if $signs }}
    - {name: signing, secret: {secretName: {{ $v.jobs.signingSecret | toJson }}}}
    {{- end }}
    {{- include "reelway.tlsVolumes" (dict "context" .context "hops" (list "redis")) | nindent 4 }}
    {{- include "reelway.rayTlsVolumes" .context | nindent 4 }}
  {{- include "reelway.rayTlsInit" (dict "context" .context "image" $v.image.training) | nindent 2 }}
  containers:
    - name: ray
      image: {{ include "reelway.image" (dict "context" .context "of" $v.image.training) | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy | toJson }}
      securityContext: {{- include "reelway.containerSecurity" .context | nindent 8 }}
      env:
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        {{- if eq $v.features.type "redis" }}
        - name: REELWAY_ONLINE_STORE
          value: {{ include "reelway.redisAddress" .context | quote }}
        {{- end }}
        {{- include "reelway.redisEnv" .context | nindent 8 }}
        {{- include "reelway.rayTlsEnv" .context | nindent 8 }}
        {{- include "reelway.storeEnv" .context | nindent 8 }}
      {{- include "reelway.rayNodeProbes" 52365 | nindent 6 }}
      resources:
        requests:
          {{- toYaml .job.resources.requests | nindent 10 }}
          {{- if $gpus }}
          {{ .job.gpuResource }}: {{ .job.gpus }}
          {{- end }}
        limits:
          {{- toYaml .job.resources.limits | nindent 10 }}
          {{- if $gpus }}
          {{ .job.gpuResource }}: {{ .job.gpus }}
          {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: work, mountPath: /var/lib/reelway/work}
        {{- if $store }}
        - {name: {{ ternary "work" "store" (eq $store $work) | toJson }}, mountPath: /var/lib/reelway/volume}
        {{- end }}
        {{- if $signs }}
        - {name: signing, mountPath: /etc/reelway/signing, readOnly: true}
        {{- end }}
        {{- include "reelway.tlsMounts" (dict "context" .context "hops" (list "redis")) | nindent 8 }}
        {{- include "reelway.rayTlsMounts" .context | nindent 8 }}
{{- end -}}

{{/* The pod that submits the job and follows its log. KubeRay sets Ray's address, the job's id and Ray's token. KubeRay's
     default command does the same with three starts of Ray's command line. */}}
{{- define "reelway.submitterPod" -}}
{{- $v := .context.Values -}}
metadata:
  labels:
    {{- include "reelway.podLabels" (dict "context" .context "component" "jobs") | nindent 4 }}
    reelway.dev/job: {{ .kind | toJson }}
    reelway.dev/role: submitter
spec:
  restartPolicy: Never
  {{- include "reelway.jobPodSpec" . | nindent 2 }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: 64Mi}}
  containers:
    - name: submitter
      image: {{ include "reelway.image" (dict "context" .context "of" $v.image.training) | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy | toJson }}
      command: [python, -m, reelway.pipelines.job_submitter]
      # Kubernetes replaces $$ by $.
      args: [{{ include "reelway.jobEntrypoint" . | replace "$" "$$" | quote }}]
      securityContext: {{- include "reelway.containerSecurity" .context | nindent 8 }}
      env:
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
      resources: {{- toYaml $v.jobs.submitter.resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
{{- end -}}

{{/* Fields of every pod of a job. */}}
{{- define "reelway.jobPodSpec" -}}
serviceAccountName: {{ include "reelway.fullname" .context }}-serving
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "reelway.podSecurity" .context | nindent 2 }}
{{- include "reelway.pullSecrets" .context }}
{{- if .context.Values.priorityClasses.create }}
priorityClassName: {{ include "reelway.fullname" .context }}-training
{{- end }}
{{- include "reelway.scheduling" (dict "of" .job) }}
{{- end -}}

{{- define "reelway.jobKinds" -}}dataset features train evaluate release{{- end -}}

{{/* Whether any kind of job has a CronJob. */}}
{{- define "reelway.jobsScheduled" -}}
{{- range $kind := splitList " " (include "reelway.jobKinds" .) }}{{ if (get $.Values.jobs $kind).enabled }}true{{ end }}{{ end -}}
{{- end -}}

{{/* Whether a volume exists that the jobs of a run can share. Without one the chart has no jobs. */}}
{{- define "reelway.jobsEnabled" -}}
{{- if or .Values.jobs.runsClaim (eq (include "reelway.storeOnVolume" .) "true") }}true{{ end -}}
{{- end -}}

{{/* Whether the API server restricts RayJobs of the namespace to the templates. */}}
{{- define "reelway.jobsRestricted" -}}
{{- if and (include "reelway.jobsEnabled" .) .Values.jobs.admissionPolicy.enabled }}true{{ end -}}
{{- end -}}

{{/* The policy is cluster-wide, so that its name contains the namespace. */}}
{{- define "reelway.jobPolicyName" -}}{{ .Release.Namespace }}-{{ include "reelway.fullname" . }}-jobs{{- end -}}
