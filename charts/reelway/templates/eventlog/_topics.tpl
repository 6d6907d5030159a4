{{/* The pod that creates topics. It runs before the chart's ServiceAccounts exist and needs no Kubernetes token. */}}
{{- define "reelway.topicsPod" -}}
{{- $e := .Values.eventLog -}}
metadata:
  labels: {{- include "reelway.podLabels" (dict "context" . "component" "topics") | nindent 4 }}
spec:
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {{- include "reelway.podSecurity" . | nindent 4 }}
  {{- include "reelway.pullSecrets" . | nindent 2 }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: 64Mi}}
    {{- include "reelway.tlsVolumes" (dict "context" . "hops" (list "kafka")) | nindent 4 }}
  containers:
    - name: create
      image: {{ include "reelway.image" (dict "context" . "of" .Values.image.operator) | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy | toJson }}
      command: [reelway, topics, create]
      args:
        - --events={{ $e.address }}
        - --viewer-partitions={{ $e.partitions.viewers | toJson }}
        - --video-partitions={{ $e.partitions.videos | toJson }}
        - --replication={{ $e.replication.factor | toJson }}
        - --min-in-sync={{ $e.replication.minInSync | toJson }}
        - --retention-hours={{ $e.retentionHours | toJson }}
      securityContext: {{- include "reelway.containerSecurity" . | nindent 8 }}
      env:
        - {name: OMP_NUM_THREADS, value: "1"}
        {{- include "reelway.kafkaEnv" . | nindent 8 }}
      resources: {{- toYaml $e.creator.resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- include "reelway.tlsMounts" (dict "context" . "hops" (list "kafka")) | nindent 8 }}
{{- end -}}
