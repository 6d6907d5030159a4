{{/* Security contexts for the `restricted` level of Pod Security, with a read-only root file system. */}}
{{- define "reelway.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "reelway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* IP families of a Service. */}}
{{- define "reelway.ipFamilies" -}}
{{- with .Values.services.ipFamilyPolicy }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .Values.services.ipFamilies }}
ipFamilies: {{ toJson . }}
{{- end }}
{{- end -}}

{{/* Address at which Ray's dashboard listens: all interfaces of the primary family, which the head's Service has. */}}
{{- define "reelway.dashboardHost" -}}
{{- if eq (first (.Values.services.ipFamilies | default (list "IPv4"))) "IPv6" }}::{{ else }}0.0.0.0{{ end -}}
{{- end -}}

{{/* Address at which Serve listens. Given `::`, Ray makes HAProxy listen at IPv4 only; `::0` is the same address, and
     takes both families. */}}
{{- define "reelway.serveHost" -}}
{{- if has "IPv6" .Values.services.ipFamilies }}::0{{ else }}0.0.0.0{{ end -}}
{{- end -}}

{{- define "reelway.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | toJson }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Scheduling of a pod. (dict "of" group) */}}
{{- define "reelway.scheduling" -}}
{{- with .of.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Environment variables for S3-compatible stores. */}}
{{- define "reelway.storeEnv" -}}
{{- $s3 := .Values.releases.store.s3 }}
{{- if eq .Values.releases.store.type "s3" }}
{{- with $s3.endpoint }}
- {name: AWS_ENDPOINT_URL_S3, value: {{ . | quote }}}
{{- end }}
{{- with $s3.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
- {name: AWS_DEFAULT_REGION, value: {{ . | quote }}}
{{- end }}
{{- if $s3.credentialsSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . | toJson }}
  valueFrom: {secretKeyRef: {name: {{ $s3.credentialsSecret | toJson }}, key: {{ . | toJson }}}}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "reelway.publicKeysVolume" -}}
- name: public-keys
{{- with .Values.releases.publicKeys }}
{{- if .configMap }}
  configMap: {name: {{ .configMap | toJson }}}
{{- else }}
  secret: {secretName: {{ .secret | toJson }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Reference to a key of the Secret. (dict "context" . "key" "webhook-token") */}}
{{- define "reelway.secretKey" -}}
secretKeyRef: {name: {{ include "reelway.secretName" .context | quote }}, key: {{ .key | toJson }}}
{{- end -}}
