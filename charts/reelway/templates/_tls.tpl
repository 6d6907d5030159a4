{{/* Variables of the Redis client: password, and certificates if the connection has its own. */}}
{{- define "reelway.redisEnv" -}}
{{- if eq .Values.features.type "redis" }}
- name: REDIS_PASSWORD
  valueFrom: {{- include "reelway.secretKey" (dict "context" . "key" "redis-password") | nindent 4 }}
{{- include "reelway.tlsEnv" (dict "prefix" "REELWAY_REDIS" "folder" "redis" "tls" .Values.features.redis.tlsFiles) }}
{{- end }}
{{- end -}}

{{/* Paths of mounted certificates. (dict "prefix" "REELWAY_KAFKA" "folder" "kafka" "tls" .Values.eventLog.tlsFiles) */}}
{{- define "reelway.tlsEnv" -}}
{{- if .tls.secret }}
- {name: {{ .prefix }}_CA_FILE, value: /etc/reelway/tls/{{ .folder }}/ca.crt}
{{- if .tls.clientCertificate }}
- {name: {{ .prefix }}_CERT_FILE, value: /etc/reelway/tls/{{ .folder }}/tls.crt}
- {name: {{ .prefix }}_KEY_FILE, value: /etc/reelway/tls/{{ .folder }}/tls.key}
{{- end }}
{{- end }}
{{- end -}}

{{/* Certificates of the clients of Redis and Kafka: name -> Secret. */}}
{{- define "reelway.tlsSecrets" -}}
{{- $v := .Values -}}
{{- if eq $v.features.type "redis" }}
{{- with $v.features.redis.tlsFiles.secret }}
redis: {{ . }}
{{- end }}
{{- end }}
{{- if include "reelway.live" . }}
{{- with $v.eventLog.tlsFiles.secret }}
kafka: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Volumes of these certificates. (dict "context" . "hops" (list "redis" "kafka")) */}}
{{- define "reelway.tlsVolumes" -}}
{{- $hops := .hops -}}
{{- range $hop, $secret := include "reelway.tlsSecrets" .context | fromYaml }}
{{- if has $hop $hops }}
- {name: {{ $hop }}-tls, secret: {secretName: {{ $secret }}}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "reelway.tlsMounts" -}}
{{- $hops := .hops -}}
{{- range $hop, $secret := include "reelway.tlsSecrets" .context | fromYaml }}
{{- if has $hop $hops }}
- {name: {{ $hop }}-tls, mountPath: /etc/reelway/tls/{{ $hop }}, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{/* TLS between the processes of Ray. Ray checks names and addresses, so each pod issues a certificate for its own address. */}}
{{- define "reelway.rayTlsEnv" -}}
{{- if .Values.ray.tls.caSecret }}
- {name: RAY_USE_TLS, value: "1"}
- {name: RAY_TLS_SERVER_CERT, value: /etc/reelway/tls/ray/tls.crt}
- {name: RAY_TLS_SERVER_KEY, value: /etc/reelway/tls/ray/tls.key}
- {name: RAY_TLS_CA_CERT, value: /etc/reelway/tls/ray/ca.crt}
{{- end }}
{{- end -}}

{{- define "reelway.rayTlsVolumes" -}}
{{- with .Values.ray.tls.caSecret }}
- {name: ray-ca, secret: {secretName: {{ . }}}}
- {name: ray-tls, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
{{- end }}
{{- end -}}

{{- define "reelway.rayTlsMounts" -}}
{{- if .Values.ray.tls.caSecret }}
- {name: ray-tls, mountPath: /etc/reelway/tls/ray, readOnly: true}
{{- end }}
{{- end -}}

{{/* The container that issues a Ray pod's certificate. No other container has the CA's key. (dict "context" . "image" .) */}}
{{- define "reelway.rayTlsInit" -}}
{{- if .context.Values.ray.tls.caSecret }}
initContainers:
  - name: ray-certificate
    image: {{ include "reelway.image" (dict "context" .context "of" .image) }}
    imagePullPolicy: {{ .context.Values.image.pullPolicy }}
    command: [python, -c]
    args:
      - |
        {{- .context.Files.Get "files/programs/issue_ray_certificate.py" | nindent 8 }}
      - /etc/reelway/ray-ca
      - /etc/reelway/tls/ray
      - {{ .context.Release.Namespace }}
    securityContext: {{- include "reelway.containerSecurity" .context | nindent 6 }}
    env:
      - name: POD_IP
        valueFrom: {fieldRef: {fieldPath: status.podIP}}
    resources: {{- toYaml .context.Values.ray.tls.resources | nindent 6 }}
    volumeMounts:
      - {name: ray-ca, mountPath: /etc/reelway/ray-ca, readOnly: true}
      - {name: ray-tls, mountPath: /etc/reelway/tls/ray}
{{- end }}
{{- end -}}
