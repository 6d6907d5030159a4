{{/* The RayJob of one kind. (dict "context" . "kind" "training") */}}
{{- define "reelway.rayJob" -}}
{{- $v := .context.Values -}}
{{- $job := get $v.jobs .kind -}}
{{- $labels := include "reelway.labels" (dict "context" .context "component" "jobs") -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  generateName: {{ include "reelway.fullname" .context | trunc 20 | trimSuffix "-" }}-{{ .kind | trunc 12 }}-
  labels:
    {{- $labels | nindent 4 }}
    reelway.dev/job: {{ .kind }}
    {{- with $v.jobs.queue }}
    kueue.x-k8s.io/queue-name: {{ . }}
    {{- end }}
spec:
  entrypoint: {{ concat $job.command (list "--run" (printf "/var/lib/reelway/work/%s" $v.jobs.workPath)) | join " " | quote }}
  # The head itself submits: no further pod, image or port.
  submissionMode: HTTPMode
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: {{ $v.jobs.ttlSecondsAfterFinished }}
  activeDeadlineSeconds: {{ $job.activeDeadlineSeconds }}
  backoffLimit: {{ $v.jobs.backoffLimit }}
  rayClusterSpec:
    rayVersion: {{ $v.ray.version | quote }}
    authOptions: {mode: token, secretName: {{ include "reelway.secretName" .context }}}
    headGroupSpec:
      rayStartParams: {dashboard-host: 0.0.0.0}
      template: {{- include "reelway.rayJobPod" (dict "context" .context "job" $job "kind" .kind "role" "head") | nindent 8 }}
    {{- if gt (int $job.workers) 0 }}
    workerGroupSpecs:
      - groupName: workers
        replicas: {{ $job.workers }}
        minReplicas: {{ $job.workers }}
        maxReplicas: {{ $job.workers }}
        rayStartParams: {}
        template: {{- include "reelway.rayJobPod" (dict "context" .context "job" $job "kind" .kind "role" "worker") | nindent 10 }}
    {{- end }}
{{- end -}}

{{- define "reelway.rayJobPod" -}}
{{- $v := .context.Values -}}
{{- $gpus := and .job.gpus (or (eq .role "worker") (eq (int .job.workers) 0)) -}}
metadata:
  labels:
    {{- include "reelway.podLabels" (dict "context" .context "component" "jobs") | nindent 4 }}
    reelway.dev/job: {{ .kind }}
spec:
  serviceAccountName: {{ include "reelway.fullname" .context }}-serving
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {{- include "reelway.podSecurity" .context | nindent 4 }}
  {{- include "reelway.pullSecrets" .context | nindent 2 }}
  {{- if $v.priorityClasses.create }}
  priorityClassName: {{ include "reelway.fullname" .context }}-training
  {{- end }}
  {{- include "reelway.placement" (dict "of" .job) | nindent 2 }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - name: work
      persistentVolumeClaim: {claimName: {{ $v.jobs.workClaim | default (include "reelway.storeClaim" .context) }}}
    {{- if $v.jobs.signingSecret }}
    - {name: signing, secret: {secretName: {{ $v.jobs.signingSecret }}}}
    {{- end }}
  containers:
    - name: ray
      image: {{ include "reelway.image" (dict "context" .context "of" $v.image.training) }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      securityContext: {{- include "reelway.containerSecurity" .context | nindent 8 }}
      env:
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        {{- if eq $v.features.type "redis" }}
        - name: REDIS_PASSWORD
          valueFrom: {{- include "reelway.secretKey" (dict "context" .context "key" "redis-password") | nindent 12 }}
        {{- end }}
        {{- include "reelway.storeEnv" .context | nindent 8 }}
      {{- if eq .role "worker" }}
      readinessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 5
        timeoutSeconds: 5
      {{- end }}
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
        {{- if $v.jobs.signingSecret }}
        - {name: signing, mountPath: /etc/reelway/signing, readOnly: true}
        {{- end }}
{{- end -}}

{{- define "reelway.jobsEnabled" -}}
{{- if or .Values.jobs.materialisation.enabled .Values.jobs.training.enabled .Values.jobs.evaluation.enabled }}true{{ end -}}
{{- end -}}
