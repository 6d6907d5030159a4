"""Why: the names under which serving counts and the rollout reads, in one place, so that neither can drift.

Names and labels only. ``release`` labels hold the first ``SHORT_RELEASE`` characters of an id.
"""

from __future__ import annotations

from typing import Final

SHORT_RELEASE: Final = 12

# What Prometheus' scrape jobs are called, so that its ``up`` tells whether the one or the other was heard.
ROUTER_JOB: Final = "reelway-router"
"""GET {url}/metrics of every router."""
OUTCOMES_JOB: Final = "reelway-outcomes"
"""GET {url}/v1/outcomes/metrics."""

# Counted by the router, in its /metrics. Labels release, arm; arm ``shadow`` for mirrored requests.
REQUESTS: Final = "reelway_ingress_requests_total"
"""One per request, label ``outcome``: one of ``REQUEST_OUTCOMES``."""
REQUEST_OUTCOMES: Final = ("ok", "context_only", "degraded", "failed")
"""``context_only``: nothing but the viewer's row was missing, which is no release's fault. ``degraded``: a stage of
the release failed or was late. ``failed``: no slate at all."""
FAULTY_OUTCOMES: Final = ("degraded", "failed")
EMPTY_SLATES: Final = "reelway_ingress_empty_slates_total"
LATENCY: Final = "reelway_ingress_latency_seconds"
"""Histogram: ``_bucket`` with ``le``, ``_count``, ``_sum``."""
SHADOW_REQUESTS: Final = "reelway_shadow_requests_total"
"""Labels release, ``outcome``: ``compared``, ``failed`` or ``dropped`` (too many were under way)."""
SHADOW_OVERLAP: Final = "reelway_shadow_overlap_ratio"
"""Histogram, labels release: share of the shown slate that the mirrored one has too."""
SHADOW_DRIFT: Final = "reelway_shadow_score_drift_ratio"
"""Histogram, labels release: |mean score / the shown slate's mean score - 1|."""

# Counted where outcomes are joined, in GET /v1/outcomes/metrics. Floats that only grow, kept through a restart.
EXPOSURE: Final = "reelway_outcomes_exposure_total"
"""Labels rollout, release, arm, slice, ``statistic``: one of ``EXPOSURE_STATISTICS``."""
STATISTIC: Final = "reelway_outcomes_statistic_total"
"""Labels as ``EXPOSURE`` plus ``metric``; ``statistic``: one of ``METRIC_STATISTICS``."""
EXPOSURE_STATISTICS: Final = ("viewers", "impressions", "sum_x", "sum_xx")
METRIC_STATISTICS: Final = ("sum_y", "sum_yy", "sum_xy")
RECEIVED: Final = "reelway_outcomes_received_total"
"""Labels release, arm, ``kind`` (an OutcomeType), ``outcome``: one of ``RECEIVED_OUTCOMES``."""
RECEIVED_OUTCOMES: Final = ("counted", "duplicate", "late", "retired", "outside")
"""``late``: after the horizon. ``retired``: its rollout has ended. ``outside``: shown outside of any rollout."""

REFUSED: Final = "reelway_outcomes_refused_total"
"""No labels: a refused token names nothing that could be believed. Counts from each start of the process."""

OUTCOME_METRICS: Final = (
    "long_watch_rate", "watch_s_per_impression", "like_rate", "share_rate", "save_rate", "follow_rate",
    "comment_rate", "skip_rate", "not_interested_rate", "report_rate",
)  # fmt: skip
"""What a policy's ``outcomes[].name`` may be: sums over a viewer's impressions, divided by the impressions."""
