"""Evidence from series: the same for a direct scrape and for Prometheus. Pure functions.

The controller adds alerts, weights and readiness.
"""

from __future__ import annotations

from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import counter_increase
from reelway.platform.rollout.evidence import EvidenceSnapshot, EvidenceState
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.sources.outcome_sums import outcome_evidence
from reelway.platform.rollout.sources.parity_findings import ParityFindings
from reelway.platform.rollout.sources.request_window import request_guardrails
from reelway.platform.rollout.sources.series_reader import (
    MAX_SHADOW_S,
    WINDOW_S,
    Scope,
    ScrapeJob,
    SeriesReadResult,
    samples_since,
    scrape_job,
)
from reelway.platform.rollout.state import RolloutState


def build_snapshot(
    policy: RolloutPolicy,
    state: RolloutState,
    read_result: SeriesReadResult,
    parity: ParityFindings,
    now: float,
    *,
    window_s: float = WINDOW_S,
) -> EvidenceSnapshot:
    """Returns the evidence about one rollout.

    Its time is that of the oldest scrape it uses, so that evidence ages when scrapes stop. If no exporter answered, its
    time is ``now`` and everything is ``telemetry_down``.
    """
    scope = Scope.of(state, window_s)
    max_age_s = policy.evidence_max_age_s
    routers = scrape_job(names.ROUTER_JOB, read_result, now=now, max_age_s=max_age_s, window_s=window_s)
    collector = scrape_job(names.OUTCOMES_JOB, read_result, now=now, max_age_s=max_age_s, window_s=window_s)
    times = [job.newest_sample_at for job in (routers, collector) if not job.problem]
    outcomes = outcome_evidence(policy, state, read_result, collector)
    return EvidenceSnapshot(
        time=min(times, default=now),
        release=state.canary_release,
        metrics=outcomes.metrics,
        audiences=outcomes.audiences,
        guardrails={
            **request_guardrails(policy, scope, read_result, routers, now),
            "parity_mismatches": parity.reading(state.canary_release),
        },
        shadow_requests=_mirrored_requests(scope, read_result, routers, now),
    )


def _mirrored_requests(scope: Scope, read_result: SeriesReadResult, routers: ScrapeJob, now: float) -> int:
    """Returns the number of mirrored requests, successful or not, in this shadow phase; 0 outside of one."""
    if scope.shadow_since is None or routers.problem:
        return 0
    since, total = max(scope.shadow_since, now - MAX_SHADOW_S), 0.0
    for key, _, samples in samples_since(read_result, routers, names.SHADOW_REQUESTS, since=since):
        if key.get("release") != scope.releases[0] or key.get("outcome") not in ("compared", "failed") or not samples:
            continue
        rise = counter_increase(samples)
        total += rise.increase if rise.state is EvidenceState.OK else 0.0
    return int(total)
