{{- define "reelway.kserveEnabled" -}}{{- if eq .Values.ranker.backend "kserve" }}true{{ end -}}{{- end -}}

{{/* KServe appends `-predictor` and uses the result as a Service's name, which has at most 63 characters. */}}
{{- define "reelway.rankerName" -}}
{{- include "reelway.fullname" .context | trunc 36 | trimSuffix "-" -}}-{{ .release }}
{{- end -}}

{{/* Address of a release's ranker. The ranking stage replaces {release}. */}}
{{- define "reelway.rankerAddress" -}}
dns:///{{ include "reelway.rankerName" (dict "context" . "release" "{release}") }}-predictor.{{ .Release.Namespace }}.svc:{{ .Values.ranker.ports.grpc }}
{{- end -}}

{{/*
InferenceService of a release's ranker: (dict "context" . "release" <first 12 characters> "releaseId" <full id>).
The operator replaces {release} and {release_id}.
*/}}
{{- define "reelway.inferenceService" -}}
{{- $v := .context.Values -}}
{{- $r := $v.ranker -}}
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {{ include "reelway.rankerName" . | quote }}
  labels:
    {{- include "reelway.podLabels" (dict "context" .context "component" "ranker") | nindent 4 }}
    app.kubernetes.io/managed-by: Helm
    reelway.dev/release: {{ .release | quote }}
  annotations:
    {{- with .owner }}
    # The operator makes the ConfigMap of this name the owner, so that uninstalling removes the InferenceService.
    reelway.dev/owner: {{ . | toJson }}
    {{- end }}
    serving.kserve.io/deploymentMode: Standard
    {{- if $r.autoscaling.enabled }}
    serving.kserve.io/autoscalerClass: hpa
    {{- else }}
    serving.kserve.io/autoscalerClass: none
    {{- end }}
spec:
  predictor:
    minReplicas: {{ $r.replicas | toJson }}
    {{- if $r.autoscaling.enabled }}
    maxReplicas: {{ $r.autoscaling.maxReplicas | toJson }}
    scaleMetric: cpu
    scaleTarget: {{ $r.autoscaling.cpuPercent | toJson }}
    {{- else }}
    maxReplicas: {{ $r.replicas | toJson }}
    {{- end }}
    # A new replica starts before an old one ends, so that a ready replica always exists.
    deploymentStrategy:
      type: RollingUpdate
      rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
    serviceAccountName: {{ include "reelway.fullname" .context }}-serving
    automountServiceAccountToken: false
    enableServiceLinks: false
    terminationGracePeriodSeconds: {{ $r.terminationGracePeriodSeconds | toJson }}
    securityContext: {{- include "reelway.podSecurity" .context | nindent 6 }}
    {{- include "reelway.pullSecrets" .context | nindent 4 }}
    {{- with include "reelway.servingPriority" .context }}
    priorityClassName: {{ . | toJson }}
    {{- end }}
    {{- include "reelway.scheduling" (dict "of" $r) | nindent 4 }}
    volumes:
      - {name: tmp, emptyDir: {sizeLimit: 256Mi}}
      - {name: cache, emptyDir: {sizeLimit: {{ $v.serving.releaseCache.size | toJson }}}}
      {{- include "reelway.publicKeysVolume" .context | nindent 6 }}
      {{- if eq (include "reelway.storeOnVolume" .context) "true" }}
      - {name: releases, persistentVolumeClaim: {claimName: {{ include "reelway.storeClaim" .context | quote }}, readOnly: true}}
      {{- end }}
    initContainers:
      # A release that is rejected ends this container with exit code 6 and the reason.
      - name: fetch-release
        image: {{ include "reelway.image" (dict "context" .context "of" $v.image.serving) | quote }}
        imagePullPolicy: {{ $v.image.pullPolicy | toJson }}
        command: [reelway, release, fetch]
        args:
          - {{ .releaseId | quote }}
          - --release-store={{ include "reelway.storeUrl" .context }}
          - --to=/var/cache/reelway/releases
          - --verify
          - --public-keys=/etc/reelway/public-keys
        securityContext: {{- include "reelway.containerSecurity" .context | nindent 10 }}
        env:
          - {name: OMP_NUM_THREADS, value: "1"}
          {{- include "reelway.storeEnv" .context | nindent 10 }}
        resources: {{- toYaml $r.resources | nindent 10 }}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - {name: cache, mountPath: /var/cache/reelway}
          - {name: public-keys, mountPath: /etc/reelway/public-keys, readOnly: true}
          {{- if eq (include "reelway.storeOnVolume" .context) "true" }}
          - {name: releases, mountPath: /var/lib/reelway/volume, readOnly: true}
          {{- end }}
    containers:
      - name: kserve-container
        image: {{ include "reelway.image" (dict "context" .context "of" $v.image.serving) | quote }}
        imagePullPolicy: {{ $v.image.pullPolicy | toJson }}
        command: [reelway, rank-server]
        args:
          - --release-dir=/var/cache/reelway/releases/{{ .releaseId }}
          - --http-port={{ $r.ports.http | toJson }}
          - --grpc-port={{ $r.ports.grpc | toJson }}
          - --threads={{ $r.threads | toJson }}
          - --max-queued-requests={{ $r.maxQueuedRequests | toJson }}
          - --max-candidates={{ $r.maxCandidates | toJson }}
          - --drain-seconds={{ $r.drainSeconds | toJson }}
          - --grace-seconds={{ sub (int $r.terminationGracePeriodSeconds) (add (int $r.drainSeconds) 2) }}
        securityContext: {{- include "reelway.containerSecurity" .context | nindent 10 }}
        env:
          - {name: OMP_NUM_THREADS, value: "1"}
        ports:
          # KServe's Service maps its port 80 to the first port, and every other port to itself.
          - {name: http1, containerPort: {{ $r.ports.http | toJson }}, protocol: TCP}
          - {name: h2c, containerPort: {{ $r.ports.grpc | toJson }}, protocol: TCP}
        # The server listens when the ranker is loaded and one request has passed through it.
        startupProbe:
          httpGet: {path: /v2/health/ready, port: {{ $r.ports.http | toJson }}}
          periodSeconds: 2
          timeoutSeconds: 2
          failureThreshold: 60
        readinessProbe:
          httpGet: {path: /v2/health/ready, port: {{ $r.ports.http | toJson }}}
          periodSeconds: 2
          timeoutSeconds: 2
          failureThreshold: 2
        livenessProbe:
          httpGet: {path: /v2/health/live, port: {{ $r.ports.http | toJson }}}
          periodSeconds: 10
          timeoutSeconds: 5
          failureThreshold: 3
        resources:
          requests:
            {{- toYaml $r.resources.requests | nindent 12 }}
            {{- if $r.gpus }}
            {{ $r.gpuResource }}: {{ $r.gpus }}
            {{- end }}
          limits:
            {{- toYaml $r.resources.limits | nindent 12 }}
            {{- if $r.gpus }}
            {{ $r.gpuResource }}: {{ $r.gpus }}
            {{- end }}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - {name: cache, mountPath: /var/cache/reelway, readOnly: true}
{{- end -}}
