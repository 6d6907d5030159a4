{{- define "reelway.checkRanker" -}}
{{- $r := .Values.ranker -}}
{{- if eq $r.backend "kserve" }}
{{- if eq (int $r.ports.http) (int $r.ports.grpc) }}
{{- include "reelway.fail" (dict "path" "ranker.ports.grpc" "saw" $r.ports.grpc "expected" "another port than ranker.ports.http") }}
{{- end }}
{{- if and $r.autoscaling.enabled (lt (int $r.autoscaling.maxReplicas) (int $r.replicas)) }}
{{- include "reelway.fail" (dict "path" "ranker.autoscaling.maxReplicas" "saw" $r.autoscaling.maxReplicas "expected" (printf "at least ranker.replicas, which is %v" $r.replicas)) }}
{{- end }}
{{- if lt (int $r.terminationGracePeriodSeconds) (add (int $r.drainSeconds) 3) }}
{{- include "reelway.fail" (dict "path" "ranker.terminationGracePeriodSeconds" "saw" $r.terminationGracePeriodSeconds "expected" (printf "at least 3 more than ranker.drainSeconds, which is %v" $r.drainSeconds)) }}
{{- end }}
{{- include "reelway.checkResources" (dict "of" $r.resources "path" "ranker.resources") }}
{{- end }}
{{- end -}}
