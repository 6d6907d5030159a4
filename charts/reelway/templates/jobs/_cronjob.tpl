{{/* A CronJob that creates a RayJob. (dict "context" . "kind" "train") */}}
{{- define "reelway.cronJob" -}}
{{- $v := .context.Values -}}
{{- $job := mergeOverwrite (deepCopy $v.jobs.defaults) (get $v.jobs .kind) -}}
{{- if $job.enabled -}}
apiVersion: batch/v1
kind: CronJob
metadata:
  name: {{ include "reelway.fullname" .context | trunc 34 | trimSuffix "-" }}-{{ .kind }}
  labels: {{- include "reelway.labels" (dict "context" .context "component" "jobs") | nindent 4 }}
spec:
  schedule: {{ $job.schedule | quote }}
  timeZone: {{ $job.timeZone | toJson }}
  suspend: {{ $job.suspend | toJson }}
  concurrencyPolicy: Forbid
  startingDeadlineSeconds: 600
  successfulJobsHistoryLimit: 3
  failedJobsHistoryLimit: 3
  jobTemplate:
    spec:
      backoffLimit: 2
      activeDeadlineSeconds: 120
      template:
        metadata:
          labels: {{- include "reelway.podLabels" (dict "context" .context "component" "job-creator") | nindent 12 }}
        spec:
          restartPolicy: Never
          serviceAccountName: {{ include "reelway.fullname" .context }}-job-creator
          enableServiceLinks: false
          securityContext: {{- include "reelway.podSecurity" .context | nindent 12 }}
          {{- include "reelway.pullSecrets" .context | nindent 10 }}
          volumes:
            - {name: programs, configMap: {name: {{ include "reelway.fullname" .context }}-jobs}}
            - {name: tmp, emptyDir: {sizeLimit: 64Mi}}
          containers:
            - name: create
              image: {{ include "reelway.image" (dict "context" .context "of" $v.image.operator) | quote }}
              imagePullPolicy: {{ $v.image.pullPolicy | toJson }}
              command: [python, /etc/reelway/jobs/create_rayjob.py, /etc/reelway/jobs/{{ .kind }}.yaml, {{ $v.jobs.historyLimit | toJson | quote }}]
              securityContext: {{- include "reelway.containerSecurity" .context | nindent 16 }}
              env:
                - name: POD_NAMESPACE
                  valueFrom: {fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}
              resources: {{- toYaml $v.jobs.creator.resources | nindent 16 }}
              volumeMounts:
                - {name: programs, mountPath: /etc/reelway/jobs, readOnly: true}
                - {name: tmp, mountPath: /tmp}
{{- end -}}
{{- end -}}
