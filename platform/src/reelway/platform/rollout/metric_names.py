"""Names and labels of the metrics that serving exports and rollouts read.

``release`` labels contain the first ``SHORT_RELEASE`` characters of a release id.
"""

from __future__ import annotations

from typing import Final

SHORT_RELEASE: Final = 12

# Names of Prometheus' scrape jobs, whose ``up`` series shows which targets were scraped.
ROUTER_JOB: Final = "reelway-router"
"""GET {internal url}/metrics of every router."""
OUTCOMES_JOB: Final = "reelway-outcomes"
"""GET {internal url}/v1/outcomes/metrics."""

# Exported by the router in /metrics. Labels release and arm; mirrored requests have the arm ``shadow``.
REQUESTS: Final = "reelway_ingress_requests_total"
"""Counts requests; label ``outcome`` is one of ``REQUEST_OUTCOMES``."""
REQUEST_OUTCOMES: Final = ("ok", "context_only", "degraded", "failed")
"""``context_only``: only the viewer's row was missing, which is not the release's fault. ``degraded``: a stage of the
release failed or timed out. ``failed``: no slate."""
FAULTY_OUTCOMES: Final = ("degraded", "failed")
EMPTY_SLATES: Final = "reelway_ingress_empty_slates_total"
LATENCY: Final = "reelway_ingress_latency_seconds"
"""Histogram: ``_bucket`` with ``le``, ``_count``, ``_sum``."""
SHADOW_REQUESTS: Final = "reelway_shadow_requests_total"
"""Labels release and ``outcome``: ``compared``, ``failed`` or ``dropped`` (too many requests in flight)."""
SHADOW_OVERLAP: Final = "reelway_shadow_overlap_ratio"
"""Histogram, label release: share of the shown slate that the mirrored slate contains, too."""
SHADOW_DRIFT: Final = "reelway_shadow_score_drift_ratio"
"""Histogram, label release: |mean score / mean score of the shown slate - 1|."""

# Exported by the outcome collector in GET /v1/outcomes/metrics. They survive a restart. A collector that starts with an
# empty file has lower values until it has read the event log.
EXPOSURE: Final = "reelway_outcomes_exposure"
"""Gauge over the viewers that are evidence. Labels rollout, release, arm, slice, ``statistic``: one of
``EXPOSURE_STATISTICS``."""
STATISTIC: Final = "reelway_outcomes_statistic"
"""Gauge; labels as ``EXPOSURE`` plus ``metric``; ``statistic``: one of ``METRIC_STATISTICS``."""
EXPOSURE_STATISTICS: Final = ("viewers", "impressions", "sum_x", "sum_xx", "idle_x", "idle_xx")
"""``idle_x`` and ``idle_xx``: of viewers with outcomes, but no long watch, like, share, save or follow."""
METRIC_STATISTICS: Final = ("sum_y", "sum_yy", "sum_xy")
AUDIENCE: Final = "reelway_outcomes_audience_total"
"""Counter over all viewers of an arm. Labels rollout, release, arm, ``statistic``: one of ``AUDIENCE_COUNTS``."""
AUDIENCE_COUNTS: Final = ("viewers", "impressions", "outcomes", "capped_impressions")
"""``capped_impressions``: those beyond the number that one viewer may contribute."""
AUDIENCE_WEIGHT: Final = "reelway_outcomes_audience_weight"
"""Gauge: overlap weights of viewers' first impressions in a rollout. Labels as ``AUDIENCE``, ``kind``: one of
``AUDIENCE_GROUPS``, ``statistic``: one of ``WEIGHT_STATISTICS``."""
AUDIENCE_GROUPS: Final = ("all", "silent", "saturated")
"""``silent``: without any outcome. ``saturated``: the same outcome on nearly every impression."""
WEIGHT_STATISTICS: Final = ("sum_w", "sum_ww")
AUDIENCE_STATISTICS: Final = (
    *AUDIENCE_COUNTS, *((group, statistic) for statistic in WEIGHT_STATISTICS for group in AUDIENCE_GROUPS),
)  # fmt: skip
"""A count, or a group and a statistic of its weights."""
RECEIVED: Final = "reelway_outcomes_received_total"
"""Labels release, arm, ``kind`` (an OutcomeType), ``outcome``: one of ``RECEIVED_OUTCOMES``."""
RECEIVED_OUTCOMES: Final = (
    "counted", "duplicate", "late", "retired", "outside", "future", "early", "contradicting", "unauthenticated",
)  # fmt: skip
"""``late``: after the horizon. ``retired``: its rollout has ended. ``outside``: shown outside any rollout.
``future``: happened after it was logged. ``early``: happened before its impression. ``contradicting``: a skip and a
long watch of one impression. ``unauthenticated``: its viewer did not prove its identity, and the service requires
it."""

REFUSED: Final = "reelway_outcomes_refused_total"
"""Exported by the router. No labels, because the content of a rejected token is not trusted."""
EXPOSURES_LOST: Final = "reelway_ingress_exposures_lost_total"
"""Exported by the router: slates that were served and are not in the event log. Labels release and arm."""
LOG_AGE: Final = "reelway_outcomes_log_age_seconds"
"""Exported by the outcome collector; label ``source``: a topic of the event log. Time since which records of the topic
may be uncounted; near 0 at the topic's end. Before the first read: time since the collector's start."""
COLLECTOR_FAULTS: Final = "reelway_outcomes_faults_total"
"""Exported by the outcome collector: reads of the event log, or transactions, that failed. Reset at a start."""
UNREADABLE: Final = "reelway_outcomes_unreadable_records_total"
"""Exported by the outcome collector; label ``source``: a topic. Records that were skipped. Reset at a start."""
BOUNDED_WATCHES: Final = "reelway_outcomes_bounded_watches_total"
"""Exported by the outcome collector: watches that counted less than reported, because they are longer than a viewer can
watch the video twice. Reset at a start."""
LATE_SLATES: Final = "reelway_outcomes_late_slates_total"
"""Exported by the outcome collector: slates of rollouts that were logged too late to be counted. Reset at a start."""
UNAUTHENTICATED_SLATES: Final = "reelway_outcomes_unauthenticated_slates_total"
"""Exported by the outcome collector: slates of rollouts that are no evidence, because their viewer did not prove its
identity. Reset at a start."""
DROPPED_ARMS: Final = "reelway_outcomes_dropped_arms_total"
"""Exported by the outcome collector: arms that are not counted any more, as too many others exist. Reset at a start."""

OUTCOME_METRICS: Final = (
    "long_watch_rate", "watch_s_per_impression", "like_rate", "share_rate", "save_rate", "follow_rate",
    "comment_rate", "skip_rate", "not_interested_rate", "report_rate", "block_creator_rate", "block_topic_rate",
)  # fmt: skip
"""Allowed values of a policy's ``outcomes[].name``: sums over a viewer's impressions, divided by the impressions."""
