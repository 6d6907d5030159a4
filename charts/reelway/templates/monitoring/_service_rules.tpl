{{/*
Alerts for people. None has a `release` label, so none moves traffic. Multi-window burn rates follow Google's SRE workbook,
chapter 5, table 5-8: the long window shows that the budget is at risk, the short window that the problem persists.
*/}}
{{- define "reelway.serviceRules" -}}
{{- $r := .Values.monitoring.rules -}}
{{- $seconds := divf (float64 $r.latencyThresholdMs) 1000.0 | toString -}}
{{- $bound := ternary $seconds (printf "%s.0" $seconds) (contains "." $seconds) -}}{{/* the format of exporters */}}
{{- $objectives := list
  (dict "name" "Availability" "budget" (divf (subf 100.0 (float64 $r.availabilityObjectivePercent)) 100.0) "record" "reelway:ingress_degraded_or_failed:ratio_rate" "what" "of the requests were degraded or failed")
  (dict "name" "Latency" "budget" (divf (subf 100.0 (float64 $r.latencyObjectivePercent)) 100.0) "record" "reelway:ingress_slow:ratio_rate" "what" (printf "of the requests took longer than %v ms" $r.latencyThresholdMs)) -}}
groups:
  - name: reelway-service-levels
    rules:
      {{- range list "5m" "30m" "1h" "6h" }}
      - record: reelway:ingress_degraded_or_failed:ratio_rate{{ . }}
        expr: |
          sum by (arm) (rate(reelway_ingress_requests_total{arm!="shadow", outcome=~"degraded|failed"}[{{ . }}]))
          / sum by (arm) (rate(reelway_ingress_requests_total{arm!="shadow"}[{{ . }}]))
      - record: reelway:ingress_slow:ratio_rate{{ . }}
        expr: |
          1 - sum by (arm) (rate(reelway_ingress_latency_seconds_bucket{arm!="shadow", le="{{ $bound }}"}[{{ . }}]))
          / sum by (arm) (rate(reelway_ingress_latency_seconds_count{arm!="shadow"}[{{ . }}]))
      {{- end }}
      {{- range $objective := $objectives }}
      {{- range $burn := list (dict "long" "1h" "short" "5m" "rate" 14.4 "severity" "page" "pace" "Fast") (dict "long" "6h" "short" "30m" "rate" 6.0 "severity" "page" "pace" "Slow") }}
      {{- $limit := mulf $burn.rate $objective.budget }}
      - alert: Reelway{{ $objective.name }}{{ $burn.pace }}Burn
        expr: |
          {{ $objective.record }}{{ $burn.long }} > {{ $limit }}
          and {{ $objective.record }}{{ $burn.short }} > {{ $limit }}
        for: {{ ternary "2m" "15m" (eq $burn.pace "Fast") | toJson }}
        labels: {severity: {{ $burn.severity | toJson }}}
        annotations:
          summary: '{{ "{{ $value | humanizePercentage }}" }} {{ $objective.what }} on arm {{ "{{ $labels.arm }}" }} in the last {{ $burn.long }}, {{ $burn.rate }} times the budget'
      {{- end }}
      {{- end }}
  - name: reelway-features
    rules:
      - alert: ReelwayViewersUnknown
        expr: |
          sum(rate(reelway_ingress_requests_total{arm!="shadow", outcome="context_only"}[10m]))
          / sum(rate(reelway_ingress_requests_total{arm!="shadow"}[10m])) > 0.2
          and sum(increase(reelway_ingress_requests_total{arm!="shadow"}[10m])) >= 100
        for: 5m
        labels: {severity: page}
        annotations:
          summary: '{{ "{{ $value | humanizePercentage }}" }} of the requests in ten minutes had no viewer row; check that the online store is reachable and filled'
      - alert: ReelwayViewerRowBug
        expr: sum by (stage) (increase(reelway_ingress_faults_total{stage=~"viewer_row|ingress", kind="unexpected"}[10m])) > 0
        labels: {severity: ticket}
        annotations:
          summary: '{{ "{{ $value | humanize }}" }} requests in ten minutes used the context alone because of an unexpected exception in stage {{ "{{ $labels.stage }}" }}; the router logs have its traceback'
      - alert: ReelwayViewerKeysUnread
        expr: sum(increase(reelway_ingress_key_faults_total[30m])) > 0
        for: 5m
        labels: {severity: page}
        annotations:
          summary: 'routers failed {{ "{{ $value | humanize }}" }} times in half an hour to read the keys that verify viewers; tokens of new keys are refused'
      - alert: ReelwayScoresDrift
        expr: |
          histogram_quantile(0.5, sum by (release, le) (rate(reelway_shadow_score_drift_ratio_bucket[10m]))) > 0.5
          and on (release) sum by (release) (increase(reelway_shadow_score_drift_ratio_count[10m])) >= 100
        for: 5m
        # The label has another name than `release`, so that drifting scores cause no rollback: a person judges them.
        labels: {severity: ticket, mirrored: '{{ "{{ $labels.release }}" }}', release: ''}
        annotations:
          summary: 'half of the mirrored slates of release {{ "{{ $labels.release }}" }} score {{ "{{ $value | humanizePercentage }}" }} or more away from what was shown'
      - alert: ReelwayFeaturesForeign
        expr: sum(reelway_ingress_foreign_features_total) > 0
        labels: {severity: ticket}
        annotations:
          summary: 'a router has opened a release with traffic although the feature store has other feature services than the release was trained on'
  - name: reelway-processes
    rules:
      - alert: ReelwayThreadFails
        expr: sum by (thread) (increase(reelway_thread_failures_total[10m])) > 0
        labels: {severity: ticket}
        annotations:
          summary: 'thread {{ "{{ $labels.thread }}" }} failed {{ "{{ $value | humanize }}" }} times in ten minutes with an unexpected exception; it is restarted, or its process ends'
  - name: reelway-operator
    rules:
      - alert: ReelwayOperatorSilent
        expr: (time() - max(reelway_rollout_last_tick_timestamp_seconds) > 60) or absent(up{job="reelway-operator"} == 1)
        for: 1m
        labels: {severity: page}
        annotations:
          summary: 'the rollout operator has not reconciled for a minute: no canary is judged or rolled back'
      - alert: ReelwayOperatorFails
        expr: sum by (kind) (increase(reelway_rollout_failures_total[5m])) > 10
        for: 5m
        labels: {severity: page}
        annotations:
          summary: 'the rollout operator failed {{ "{{ $value | humanize }}" }} times in five minutes: {{ "{{ $labels.kind }}" }}'
      - alert: ReelwayWebhookRefused
        expr: sum by (outcome) (increase(reelway_rollout_webhooks_total{outcome!~"stored|known"}[5m])) > 0
        labels: {severity: ticket}
        annotations:
          summary: 'the webhook answered {{ "{{ $value | humanize }}" }} deliveries with {{ "{{ $labels.outcome }}" }}; check the token that Alertmanager sends'
      - alert: ReelwayEvidenceSuspected
        expr: max by (kind) (reelway_rollout_suspicion) == 1
        for: 5m
        labels: {severity: ticket}
        annotations:
          summary: 'the arms have different audiences ({{ "{{ $labels.kind }}" }}), so viewers may be forged; the rollout holds'
{{- end -}}
