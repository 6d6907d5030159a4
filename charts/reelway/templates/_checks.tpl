{{/* Rules that values.schema.json cannot express. Each failure states the path, the value and the values allowed. */}}
{{- define "reelway.fail" -}}
{{- fail (printf "\n\n%s: saw %s, expected %s\n" .path (toJson .saw) .expected) -}}
{{- end -}}

{{- define "reelway.check" -}}
{{- $v := .Values -}}
{{- if and $v.serving.enabled (not $v.releases.initial) }}
{{- include "reelway.fail" (dict "path" "releases.initial" "saw" "" "expected" "the whole id of a release in the store: 64 hexadecimal digits; or serving.enabled: false until `reelway submit release` has made one") }}
{{- end }}
{{- if and (not $v.secrets.generate) (not $v.secrets.name) }}
{{- include "reelway.fail" (dict "path" "secrets.name" "saw" "" "expected" "the name of a Secret with the keys auth_token, impression-tokens and webhook-token (with eventLog.address also catalogue-token), or secrets.generate: true for development") }}
{{- end }}
{{- include "reelway.checkStore" . }}
{{- include "reelway.checkRay" . }}
{{- include "reelway.checkServing" . }}
{{- include "reelway.checkAuth" . }}
{{- include "reelway.checkFeatures" . }}
{{- include "reelway.checkServingFolders" . }}
{{- include "reelway.checkJobs" . }}
{{- include "reelway.checkLive" . }}
{{- include "reelway.checkMonitoring" . }}
{{- include "reelway.checkRanker" . }}
{{- end -}}

{{- define "reelway.checkStore" -}}
{{- $s := .Values.releases.store -}}
{{- $keys := .Values.releases.publicKeys -}}
{{- if and (eq $s.type "s3") (not $s.s3.bucket) }}
{{- include "reelway.fail" (dict "path" "releases.store.s3.bucket" "saw" "" "expected" "a bucket, because releases.store.type is s3") }}
{{- end }}
{{- if and (eq $s.type "gs") (not $s.gs.bucket) }}
{{- include "reelway.fail" (dict "path" "releases.store.gs.bucket" "saw" "" "expected" "a bucket, because releases.store.type is gs") }}
{{- end }}
{{- if and (eq $s.type "hostPath") (not $s.hostPath.path) }}
{{- include "reelway.fail" (dict "path" "releases.store.hostPath.path" "saw" "" "expected" "an absolute path of the node, because releases.store.type is hostPath") }}
{{- end }}
{{- if and (eq $s.type "hostPath") $s.pvc.existingClaim }}
{{- include "reelway.fail" (dict "path" "releases.store.pvc.existingClaim" "saw" $s.pvc.existingClaim "expected" "no value, because releases.store.type is hostPath; set the type to pvc to use the claim") }}
{{- end }}
{{- if not (or $keys.configMap $keys.secret) }}
{{- include "reelway.fail" (dict "path" "releases.publicKeys.configMap" "saw" "" "expected" "a ConfigMap with *.public.pem, or a Secret in releases.publicKeys.secret") }}
{{- end }}
{{- if and $keys.configMap $keys.secret }}
{{- include "reelway.fail" (dict "path" "releases.publicKeys.secret" "saw" $keys.secret "expected" (printf "no value, because releases.publicKeys.configMap is %s" $keys.configMap)) }}
{{- end }}
{{- end -}}

{{- define "reelway.checkRay" -}}
{{- $v := .Values -}}
{{- $p := include "reelway.rayPorts" . | fromYaml -}}
{{- $ranges := list (list "workerMin" "workerMax") (list "ingressMin" "ingressMax") -}}
{{- range $pair := $ranges }}
{{- $low := get $p (index $pair 0) | int }}{{- $high := get $p (index $pair 1) | int }}
{{- if ge $low $high }}
{{- include "reelway.fail" (dict "path" (printf "ray.ports.%s" (index $pair 1)) "saw" $high "expected" (printf "more than ray.ports.%s, which is %d" (index $pair 0) $low)) }}
{{- end }}
{{- end }}
{{- if and (le (int $p.workerMin) (int $p.ingressMax)) (le (int $p.ingressMin) (int $p.workerMax)) }}
{{- include "reelway.fail" (dict "path" "ray.ports.ingressMin" "saw" (int $p.ingressMin) "expected" (printf "a range outside of ray.ports.workerMin to ray.ports.workerMax, which are %v to %v" $p.workerMin $p.workerMax)) }}
{{- end }}
{{- if gt (int $p.ingressGrpcMax) 65535 }}
{{- include "reelway.fail" (dict "path" "ray.ports.ingressMax" "saw" (int $p.ingressMax) "expected" "at most 55535, because gRPC uses the ports 10000 above") }}
{{- end }}
{{- if and (le (int $p.workerMin) (int $p.ingressGrpcMax)) (le (int $p.ingressGrpcMin) (int $p.workerMax)) }}
{{- include "reelway.fail" (dict "path" "ray.ports.workerMin" "saw" (int $p.workerMin) "expected" (printf "a range outside of the gRPC ports %v to %v, which follow ray.ports.ingressMin and ingressMax" $p.ingressGrpcMin $p.ingressGrpcMax)) }}
{{- end }}
{{- $single := dict }}
{{- range $name := list "gcs" "dashboard" "client" "nodeManager" "objectManager" "runtimeEnvAgent" "agentGrpc" "agentHttp" "metrics" }}
{{- $_ := set $single (get $p $name | toString) (printf "Ray's %s port" $name) }}
{{- end }}
{{- $named := dict "serving.port" $v.serving.port "serving.internalPort" $v.serving.internalPort "serving.metrics.port" $v.serving.metrics.port }}
{{- range $path := keys $named | sortAlpha }}
{{- $port := get $named $path | int }}
{{- with get $single (toString $port) }}
{{- include "reelway.fail" (dict "path" $path "saw" $port "expected" (printf "a port other than that of %s" .)) }}
{{- end }}
{{- $_ := set $single (toString $port) $path }}
{{- end }}
{{- range $port, $owner := $single }}
{{- range $pair := append $ranges (list "ingressGrpcMin" "ingressGrpcMax") }}
{{- $low := get $p (index $pair 0) | int }}{{- $high := get $p (index $pair 1) | int }}
{{- if and (ge (int $port) $low) (le (int $port) $high) }}
{{- include "reelway.fail" (dict "path" (ternary $owner (printf "ray.ports.%s" (index $pair 0)) (hasPrefix "serving." $owner)) "saw" (ternary (int $port) $low (hasPrefix "serving." $owner)) "expected" (printf "no overlap of %s (%s) with the range %d to %d of ray.ports" $owner $port $low $high)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "reelway.checkServing" -}}
{{- $v := .Values -}}
{{- $gpus := 0 }}{{- $pods := 0 }}
{{- range $name, $group := include "reelway.workers" . | fromYaml }}
{{- $path := printf "serving.workers.%s" $name }}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) }}
{{- include "reelway.fail" (dict "path" (printf "%s.minReplicas" $path) "saw" $group.minReplicas "expected" (printf "at most maxReplicas, which is %v" $group.maxReplicas)) }}
{{- end }}
{{- if or (lt (int $group.replicas) (int $group.minReplicas)) (gt (int $group.replicas) (int $group.maxReplicas)) }}
{{- include "reelway.fail" (dict "path" (printf "%s.replicas" $path) "saw" $group.replicas "expected" (printf "between minReplicas and maxReplicas, which are %v and %v" $group.minReplicas $group.maxReplicas)) }}
{{- end }}
{{- $gpus = add $gpus (mul (int $group.gpus) (int $group.maxReplicas)) }}
{{- $pods = add $pods (int $group.maxReplicas) }}
{{- include "reelway.checkResources" (dict "of" $group.resources "path" (printf "%s.resources" $path)) }}
{{- end }}
{{- include "reelway.checkResources" (dict "of" $v.serving.head.resources "path" "serving.head.resources") }}
{{- if and (eq $pods 0) (eq (float64 $v.serving.head.cpus) 0.0) }}
{{- include "reelway.fail" (dict "path" "serving.head.cpus" "saw" $v.serving.head.cpus "expected" "more than 0, because there is no worker in serving.workers for the replicas") }}
{{- end }}
{{- if gt (int $v.serving.queue.maxOngoingSustained) (int $v.serving.queue.maxOngoingRequests) }}
{{- include "reelway.fail" (dict "path" "serving.queue.maxOngoingSustained" "saw" $v.serving.queue.maxOngoingSustained "expected" (printf "at most serving.queue.maxOngoingRequests, which is %v" $v.serving.queue.maxOngoingRequests)) }}
{{- end }}
{{- range $name, $one := $v.serving.deployments }}
{{- $path := printf "serving.deployments.%s" $name }}
{{- if and (gt (float64 $one.gpus) 0.0) (eq $gpus 0) }}
{{- include "reelway.fail" (dict "path" (printf "%s.gpus" $path) "saw" $one.gpus "expected" "0, because no group of serving.workers has GPUs") }}
{{- end }}
{{- if gt (int $one.autoscaling.min) (int $one.autoscaling.max) }}
{{- include "reelway.fail" (dict "path" (printf "%s.autoscaling.min" $path) "saw" $one.autoscaling.min "expected" (printf "at most autoscaling.max, which is %v" $one.autoscaling.max)) }}
{{- end }}
{{- end }}
{{- if and (eq $v.serving.composition "fused") (eq $v.ranker.backend "kserve") }}
{{- include "reelway.fail" (dict "path" "serving.composition" "saw" "fused" "expected" "staged, because ranker.backend is kserve and a fused release ranks in the routers") }}
{{- end }}
{{- include "reelway.checkCapacity" . }}
{{- if and $v.serving.ingress.enabled (not $v.serving.ingress.host) }}
{{- include "reelway.fail" (dict "path" "serving.ingress.host" "saw" "" "expected" "a host name, because serving.ingress.enabled is true") }}
{{- end }}
{{- if and $v.serving.httpRoute.enabled (not $v.serving.httpRoute.parentRefs) }}
{{- include "reelway.fail" (dict "path" "serving.httpRoute.parentRefs" "saw" list "expected" "at least one Gateway, because serving.httpRoute.enabled is true") }}
{{- end }}
{{- /* The operator refuses this too: a token must not leave the cluster in clear text. */}}
{{- range $name := list "prometheus" "alertmanager" }}
{{- $url := get $v.operator (printf "%sUrl" $name) }}
{{- if and (get $v.operator (printf "%sAccess" $name)).tokenSecret (hasPrefix "http://" $url) (not (regexMatch `^http://([a-z][-a-z0-9]*|[a-z][-a-z0-9.]+\.svc(\.cluster\.local)?)(:[0-9]+)?(/.*)?$` $url)) }}
{{- include "reelway.fail" (dict "path" (printf "operator.%sUrl" $name) "saw" $url "expected" "https://, because the bearer token of its tokenSecret would leave the cluster in clear text; a service of the cluster is NAME.NAMESPACE.svc") }}
{{- end }}
{{- end }}
{{- range $path, $env := dict "serving.env" ($v.serving.env | default dict) "operator.env" ($v.operator.env | default dict) }}
{{- range $name := list "RAY_AUTH_TOKEN" "REELWAY_TOKEN_SECRET" "REELWAY_WEBHOOK_TOKEN" "REDIS_PASSWORD" "AWS_SECRET_ACCESS_KEY" }}
{{- if hasKey $env $name }}
{{- include "reelway.fail" (dict "path" (printf "%s.%s" $path $name) "saw" "(hidden)" "expected" "no value: secrets are read from a Secret (secrets.name, releases.store.s3.credentialsSecret)") }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The keys of auth.mode, and no route to a service that anyone may ask for any viewer. */}}
{{- define "reelway.checkAuth" -}}
{{- $a := .Values.auth -}}
{{- $mode := include "reelway.authMode" . -}}
{{- range $route := list "ingress" "httpRoute" }}
{{- if and (get $.Values.serving $route).enabled (eq $mode "off") (not $a.allowUnauthenticated) }}
{{- include "reelway.fail" (dict "path" "auth.mode" "saw" "off" "expected" (printf "jwt or gateway, because serving.%s.enabled is true and anyone could ask for any viewer; or auth.allowUnauthenticated: true" $route)) }}
{{- end }}
{{- end }}
{{- if and (or $.Values.serving.ingress.enabled $.Values.serving.httpRoute.enabled) (gt (float64 $a.perAddress.requestsPerSecond) 0.0) (eq (int $a.trustedProxies) 0) }}
{{- include "reelway.fail" (dict "path" "auth.trustedProxies" "saw" 0 "expected" "at least 1, because an Ingress or HTTPRoute is enabled: all clients would have the address of its proxy and share one limit; or auth.perAddress.requestsPerSecond: 0") }}
{{- end }}
{{- if eq $mode "jwt" }}
{{- if not $a.jwt.audience }}
{{- include "reelway.fail" (dict "path" "auth.jwt.audience" "saw" "" "expected" "the audience of the viewers' tokens, because auth.mode is jwt") }}
{{- end }}
{{- if not (or $a.jwt.jwksUrl $a.jwt.keysConfigMap) }}
{{- include "reelway.fail" (dict "path" "auth.jwt.jwksUrl" "saw" "" "expected" "the URL of a key set, or a ConfigMap in auth.jwt.keysConfigMap, because auth.mode is jwt") }}
{{- end }}
{{- if and $a.jwt.jwksUrl $a.jwt.keysConfigMap }}
{{- include "reelway.fail" (dict "path" "auth.jwt.keysConfigMap" "saw" $a.jwt.keysConfigMap "expected" (printf "no value, because auth.jwt.jwksUrl is %s" $a.jwt.jwksUrl)) }}
{{- end }}
{{- end }}
{{- if and (eq $mode "gateway") (not $a.gateway.keysSecret) }}
{{- include "reelway.fail" (dict "path" "auth.gateway.keysSecret" "saw" "" "expected" "a Secret with the key `keys`, because auth.mode is gateway") }}
{{- end }}
{{- end -}}

{{/* A rollout runs the stages of two releases at the same time: Ray must have CPUs for both. */}}
{{- define "reelway.checkCapacity" -}}
{{- $s := .Values.serving -}}
{{- $scaling := .Values.ray.autoscaling.enabled -}}
{{- $capacity := float64 $s.head.cpus }}
{{- range $group := include "reelway.workers" . | fromYaml }}
{{- $cpus := include "reelway.quantity" $group.resources.requests.cpu | float64 | floor | int | max 1 }}
{{- $capacity = addf $capacity (mulf (ternary $group.maxReplicas $group.replicas $scaling) $cpus) }}
{{- end }}
{{- $demand := 0.0 }}
{{- range $name, $deployment := $s.deployments }}
{{- $replicas := ternary $deployment.autoscaling.min $deployment.replicas $deployment.autoscaling.enabled }}
{{- if eq $name "router" }}
{{- $demand = addf $demand (mulf $replicas $deployment.cpus) }}
{{- end }}
{{- if and (ne $name "router") (eq $s.composition "staged") }}
{{- $demand = addf $demand (mulf $replicas $deployment.cpus 2) }}
{{- end }}
{{- if and (eq $name "router") (eq $s.composition "fused") }}
{{- $demand = addf $demand (mulf $deployment.cpus 2) }}
{{- end }}
{{- end }}
{{- if gt $demand $capacity }}
{{- $what := ternary "the routers and the stages of two releases, as serving.deployments states them" "the routers, and one more replica of their size for each of two releases" (eq $s.composition "staged") }}
{{- include "reelway.fail" (dict "path" "serving.workers" "saw" (printf "%v CPUs in all" $capacity) "expected" (printf "at least %v: %s" $demand $what)) }}
{{- end }}
{{- end -}}

{{/* Fails if a limit is below its request. */}}
{{- define "reelway.checkResources" -}}
{{- $r := .of -}}{{- $path := .path -}}
{{- range $kind := list "cpu" "memory" }}
{{- $request := include "reelway.quantity" (get $r.requests $kind) | float64 }}
{{- $limit := include "reelway.quantity" (get $r.limits $kind) | float64 }}
{{- if gt $request $limit }}
{{- include "reelway.fail" (dict "path" (printf "%s.limits.%s" $path $kind) "saw" (get $r.limits $kind) "expected" (printf "at least the request, which is %v" (get $r.requests $kind))) }}
{{- end }}
{{- end }}
{{- end -}}

{{/* A Kubernetes quantity as a number. */}}
{{- define "reelway.quantity" -}}
{{- $text := toString . -}}
{{- $units := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- mulf (float64 (trimSuffix $unit $text)) (get $units $unit | default 1.0) -}}
{{- end -}}

{{- define "reelway.checkFeatures" -}}
{{- $f := .Values.features -}}
{{- if and (eq $f.type "directory") (ne (include "reelway.storeOnVolume" .) "true") }}
{{- include "reelway.fail" (dict "path" "features.type" "saw" "directory" "expected" "redis or none, because releases.store.type is no volume") }}
{{- end }}
{{- if eq $f.type "redis" }}
{{- if not $f.registry }}
{{- include "reelway.fail" (dict "path" "features.registry" "saw" "" "expected" "path or URL of Feast's registry, because features.type is redis") }}
{{- end }}
{{- if and (eq $f.redis.mode "external") (not $f.redis.host) }}
{{- include "reelway.fail" (dict "path" "features.redis.host" "saw" "" "expected" "a host name, because features.redis.mode is external") }}
{{- end }}
{{- if and (eq $f.redis.mode "bundled") $f.redis.host }}
{{- include "reelway.fail" (dict "path" "features.redis.host" "saw" $f.redis.host "expected" "no value, because features.redis.mode is bundled") }}
{{- end }}
{{- if and (eq $f.redis.mode "bundled") $f.redis.tls }}
{{- include "reelway.fail" (dict "path" "features.redis.tls" "saw" true "expected" "false, because features.redis.mode is bundled; an external Redis may have TLS") }}
{{- end }}
{{- if and $f.redis.tlsFiles.secret (not $f.redis.tls) }}
{{- include "reelway.fail" (dict "path" "features.redis.tlsFiles.secret" "saw" $f.redis.tlsFiles.secret "expected" "no value, because features.redis.tls is false") }}
{{- end }}
{{- if and $f.redis.tlsFiles.clientCertificate (not $f.redis.tlsFiles.secret) }}
{{- include "reelway.fail" (dict "path" "features.redis.tlsFiles.secret" "saw" "" "expected" "a Secret with ca.crt, tls.crt and tls.key, because features.redis.tlsFiles.clientCertificate is true") }}
{{- end }}
{{- include "reelway.checkResources" (dict "of" $f.redis.resources "path" "features.redis.resources") }}
{{- end }}
{{- end -}}

{{/* Folders that serving pods write must leave the release store read-only. */}}
{{- define "reelway.checkServingFolders" -}}
{{- $v := .Values -}}
{{- $log := $v.serving.parity.log | default "" -}}
{{- $store := trimSuffix "/" $v.releases.store.path -}}
{{- if eq (include "reelway.storeOnVolume" .) "true" }}
{{- if and (hasPrefix "/" $log) (not (hasPrefix "/var/lib/reelway/volume/" $log)) }}
{{- include "reelway.fail" (dict "path" "serving.parity.log" "saw" $v.serving.parity.log "expected" "a URL, or a folder below /var/lib/reelway/volume, where the release store's volume is mounted") }}
{{- end }}
{{- range $path, $folder := dict "features.directory" (ternary (printf "/var/lib/reelway/volume/%s" $v.features.directory) "" (eq $v.features.type "directory")) "serving.parity.log" $log "overlay.url" ($v.overlay.url | default "") }}
{{- if hasPrefix "/var/lib/reelway/volume/" $folder }}
{{- $below := trimPrefix "/var/lib/reelway/volume/" $folder | trimSuffix "/" }}
{{- if or (not $below) (has "." (splitList "/" $below)) (has ".." (splitList "/" $below)) (has "" (splitList "/" $below)) }}
{{- include "reelway.fail" (dict "path" $path "saw" $folder "expected" "a folder without `.` and `..`, because serving pods write only there") }}
{{- end }}
{{- if or (eq $below $store) (hasPrefix (printf "%s/" $below) $store) }}
{{- include "reelway.fail" (dict "path" $path "saw" $folder "expected" (printf "a folder that does not contain the release store (releases.store.path is %s), which serving pods only read" $store)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "reelway.checkJobs" -}}
{{- $v := .Values -}}
{{- range $kind := splitList " " (include "reelway.jobKinds" .) }}
{{- $job := mergeOverwrite (deepCopy $v.jobs.defaults) (get $v.jobs $kind) }}
{{- if $job.enabled }}
{{- if and (not $v.jobs.runsClaim) (ne (include "reelway.storeOnVolume" $) "true") }}
{{- include "reelway.fail" (dict "path" "jobs.runsClaim" "saw" "" "expected" (printf "a claim for the files of a run, because jobs.%s.enabled is true and releases.store.type is no volume" $kind)) }}
{{- end }}
{{- include "reelway.checkResources" (dict "of" $job.resources "path" (printf "jobs.%s.resources" $kind)) }}
{{- end }}
{{- if ne (first $job.command) "reelway" }}
{{- include "reelway.fail" (dict "path" (printf "jobs.%s.command" $kind) "saw" $job.command "expected" "a command that begins with reelway") }}
{{- end }}
{{- end }}
{{- with $v.jobs.parity }}
{{- if and $v.serving.parity.log (not (contains "://" ($v.serving.parity.log | default ""))) (ne (include "reelway.storeOnVolume" $) "true") }}
{{- include "reelway.fail" (dict "path" "serving.parity.log" "saw" $v.serving.parity.log "expected" "a URL that serving pods and the parity job reach, because releases.store.type is no volume") }}
{{- end }}
{{- include "reelway.checkResources" (dict "of" .resources "path" "jobs.parity.resources") }}
{{- end }}
{{- end -}}

{{- define "reelway.checkMonitoring" -}}
{{- $v := .Values -}}
{{- if and $v.monitoring.rules.enabled (not $v.monitoring.monitors.enabled) }}
{{- include "reelway.fail" (dict "path" "monitoring.monitors.enabled" "saw" false "expected" "true, because monitoring.rules.enabled is true and rules without their scrape jobs never fire") }}
{{- end }}
{{- if and $v.monitoring.alertmanagerConfig.enabled (not $v.monitoring.rules.enabled) }}
{{- include "reelway.fail" (dict "path" "monitoring.rules.enabled" "saw" false "expected" "true, because monitoring.alertmanagerConfig.enabled is true and there would be no alert to route") }}
{{- end }}
{{- if and $v.operator.podDisruptionBudget.enabled (lt (int $v.operator.replicas) 2) }}
{{- include "reelway.fail" (dict "path" "operator.podDisruptionBudget.enabled" "saw" true "expected" "false, because operator.replicas is below 2") }}
{{- end }}
{{- end -}}

{{- define "reelway.checkLive" -}}
{{- $v := .Values -}}
{{- if include "reelway.live" . }}
{{- if gt (int $v.eventLog.replication.minInSync) (int $v.eventLog.replication.factor) }}
{{- include "reelway.fail" (dict "path" "eventLog.replication.minInSync" "saw" $v.eventLog.replication.minInSync "expected" (printf "at most eventLog.replication.factor, which is %v" $v.eventLog.replication.factor)) }}
{{- end }}
{{- if and $v.eventLog.tlsFiles.clientCertificate (not $v.eventLog.tlsFiles.secret) }}
{{- include "reelway.fail" (dict "path" "eventLog.tlsFiles.secret" "saw" "" "expected" "a Secret with ca.crt, tls.crt and tls.key, because eventLog.tlsFiles.clientCertificate is true") }}
{{- end }}
{{- include "reelway.checkResources" (dict "of" $v.eventLog.creator.resources "path" "eventLog.creator.resources") }}
{{- if $v.stream.enabled }}
{{- if ne (include "reelway.jobsEnabled" .) "true" }}
{{- include "reelway.fail" (dict "path" "jobs.runsClaim" "saw" "" "expected" "a claim for the files of a run, because eventLog.address is set, stream.enabled is true and releases.store.type is no volume") }}
{{- end }}
{{- if and (eq (include "reelway.parityEnabled" .) "true") (contains "://" ($v.jobs.parity.run | default "")) }}
{{- include "reelway.fail" (dict "path" "jobs.parity.run" "saw" $v.jobs.parity.run "expected" "no URL, because stream.enabled is true: the replay needs the clock that the stream writes into the run of jobs.runsClaim") }}
{{- end }}
{{- if gt (int $v.stream.replicas) (int $v.eventLog.partitions.viewers) }}
{{- include "reelway.fail" (dict "path" "stream.replicas" "saw" $v.stream.replicas "expected" (printf "at most eventLog.partitions.viewers, which is %v: further pods would have no partition" $v.eventLog.partitions.viewers)) }}
{{- end }}
{{- end }}
{{- if and (hasPrefix "/" ($v.overlay.url | default "")) (ne (include "reelway.storeOnVolume" .) "true") }}
{{- include "reelway.fail" (dict "path" "overlay.url" "saw" $v.overlay.url "expected" "a URL that serving pods reach, because releases.store.type is no volume") }}
{{- end }}
{{- if and (hasPrefix "/" ($v.overlay.url | default "")) (not (hasPrefix "/var/lib/reelway/volume/" ($v.overlay.url | default ""))) }}
{{- include "reelway.fail" (dict "path" "overlay.url" "saw" $v.overlay.url "expected" "a URL, or a folder below /var/lib/reelway/volume, where the release store's volume is mounted") }}
{{- end }}
{{- range $name := list "stream" "overlay" "catalogue" }}
{{- include "reelway.checkResources" (dict "of" (get $v $name).resources "path" (printf "%s.resources" $name)) }}
{{- end }}
{{- end }}
{{- end -}}
