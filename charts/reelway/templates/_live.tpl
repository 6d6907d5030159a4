{{/* Whether there is a service, and an event log on Kafka is named; the live parts are on then. */}}
{{- define "reelway.live" -}}
{{- if and .Values.serving.enabled .Values.eventLog.address }}true{{ end -}}
{{- end -}}

{{/* Whether a live component runs. (dict "context" . "component" "stream") */}}
{{- define "reelway.liveComponent" -}}
{{- if and (include "reelway.live" .context) (get .context.Values .component).enabled }}true{{ end -}}
{{- end -}}

{{/* URL or path of the overlay: written by the feature stream and the overlay writer, read by serving pods. */}}
{{- define "reelway.overlayUrl" -}}
{{- $store := .Values.releases.store -}}
{{- if .Values.overlay.url }}{{ .Values.overlay.url }}
{{- else }}{{ include "reelway.storeUrl" . | trimSuffix $store.path }}{{ $folder := dir $store.path }}{{ if ne $folder "." }}{{ $folder }}/{{ end }}overlay{{ end -}}
{{- end -}}

{{/* Credentials of Kafka, as `reelway` reads them. */}}
{{- define "reelway.kafkaEnv" -}}
{{- if include "reelway.live" . }}
{{- with .Values.eventLog.kafkaSettingsSecret }}
- name: REELWAY_KAFKA_SETTINGS
  valueFrom: {secretKeyRef: {name: {{ . | toJson }}, key: settings}}
{{- end }}
{{- include "reelway.tlsEnv" (dict "prefix" "REELWAY_KAFKA" "folder" "kafka" "tls" .Values.eventLog.tlsFiles) }}
{{- end }}
{{- end -}}

{{/* Egress to the brokers, at the ports of the event log's address. Brokers are seldom pods of this namespace. */}}
{{- define "reelway.kafkaEgress" -}}
{{- if include "reelway.live" . }}
- ports:
    {{- range regexFindAll `:[0-9]+` .Values.eventLog.address -1 | uniq }}
    - {protocol: TCP, port: {{ trimPrefix ":" . | int | toJson }}}
    {{- end }}
  {{- with .Values.networkPolicies.kafka }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Fields of a live component's pod before its volumes. (dict "context" . "of" .Values.stream "grace" 30) */}}
{{- define "reelway.livePodSpec" -}}
serviceAccountName: {{ include "reelway.fullname" .context }}-serving
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .grace | toJson }}
securityContext: {{- include "reelway.podSecurity" .context | nindent 2 }}
{{- include "reelway.pullSecrets" .context }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . | toJson }}
{{- end }}
{{- include "reelway.scheduling" (dict "of" .of) }}
{{- end -}}

{{/* The volume of a pod's state: an emptyDir, or nothing if a claim template provides it. (.Values.stream.state) */}}
{{- define "reelway.stateVolume" -}}
{{- if not .persistent }}
- {name: state, emptyDir: {sizeLimit: {{ .size | toJson }}}}
{{- end }}
{{- end -}}

{{/* Claim templates of a StatefulSet. (dict "context" . "state" .Values.stream.state "component" "stream") */}}
{{- define "reelway.stateClaims" -}}
{{- if .state.persistent }}
volumeClaimTemplates:
  - metadata:
      name: state
      labels: {{- include "reelway.podLabels" (dict "context" .context "component" .component) | nindent 8 }}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with .state.storageClassName }}
      storageClassName: {{ . | toJson }}
      {{- end }}
      resources: {requests: {storage: {{ .state.size | toJson }}}}
{{- end }}
{{- end -}}

{{/* The claim with the files of runs, and the claim of the store if it is another one. */}}
{{- define "reelway.runVolumes" -}}
{{- $store := and (eq (include "reelway.storeOnVolume" .) "true") (include "reelway.storeClaim" .) -}}
{{- $work := .Values.jobs.runsClaim | default (include "reelway.storeClaim" .) -}}
- {name: work, persistentVolumeClaim: {claimName: {{ $work | toJson }}}}
{{- if and $store (ne $store $work) }}
- {name: store, persistentVolumeClaim: {claimName: {{ $store | toJson }}}}
{{- end }}
{{- end -}}

{{/* Mounts of these claims. */}}
{{- define "reelway.runMounts" -}}
{{- $store := and (eq (include "reelway.storeOnVolume" .) "true") (include "reelway.storeClaim" .) -}}
{{- $work := .Values.jobs.runsClaim | default (include "reelway.storeClaim" .) -}}
- {name: work, mountPath: /var/lib/reelway/work}
{{- if $store }}
- {name: {{ ternary "work" "store" (eq $store $work) | toJson }}, mountPath: /var/lib/reelway/volume}
{{- end }}
{{- end -}}

{{/* A PodMonitor of a live component. (dict "context" . "component" "stream" "port" "metrics") */}}
{{- define "reelway.livePodMonitor" -}}
{{- $m := .context.Values.monitoring.monitors -}}
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: {{ include "reelway.fullname" .context }}-{{ .component }}
  labels:
    {{- include "reelway.labels" (dict "context" .context "component" "monitoring") | nindent 4 }}
    {{- with $m.labels }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  selector:
    matchLabels: {{- include "reelway.selector" (dict "context" .context "component" .component) | nindent 6 }}
  podMetricsEndpoints:
    - port: {{ .port | toJson }}
      path: /metrics
      interval: {{ $m.interval | toJson }}
      scrapeTimeout: {{ $m.interval | toJson }}
      relabelings:
        - {targetLabel: job, replacement: reelway-{{ .component }}}
{{- end -}}
