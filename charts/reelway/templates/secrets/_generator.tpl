{{/*
A Helm hook that runs before the pods that mount the Secret. Argo CD runs it as a PreSync hook. With `kubectl apply` its
objects are ordinary ones: nothing in them changes between two renderings.
*/}}
{{- define "reelway.generatorHook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

{{- define "reelway.generatorName" -}}
{{- include "reelway.fullname" . }}-secrets
{{- end -}}

{{- define "reelway.generatorPod" -}}
metadata:
  labels: {{- include "reelway.podLabels" (dict "context" . "component" "secrets") | nindent 4 }}
spec:
  restartPolicy: OnFailure
  serviceAccountName: {{ include "reelway.generatorName" . | quote }}
  enableServiceLinks: false
  securityContext: {{- include "reelway.podSecurity" . | nindent 4 }}
  {{- include "reelway.pullSecrets" . | nindent 2 }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: 64Mi}}
  containers:
    - name: create
      image: {{ include "reelway.image" (dict "context" . "of" .Values.image.operator) | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy | toJson }}
      command: [python, -c]
      args:
        - |
          {{- .Files.Get "files/programs/create_secret.py" | nindent 10 }}
        - {{ include "reelway.secretName" . | quote }}
        - auth_token
        - impression-tokens
        - webhook-token
        - redis-password
        - catalogue-token
      securityContext: {{- include "reelway.containerSecurity" . | nindent 8 }}
      env:
        - name: POD_NAMESPACE
          valueFrom: {fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}
      resources: {{- toYaml .Values.secrets.generator.resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
{{- end -}}
