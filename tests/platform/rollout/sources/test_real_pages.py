"""Evidence from the real endpoints of router and collector."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.support.rollout.exporter import Exporter
from tests.support.rollout.series_fixtures import POLICY, state_of
from tests.support.serving.raw_events import (
    NOW,
    RELEASES,
    RawOutcome,
    ShownImpression,
    exposure_record,
    outcome_record,
)

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.rollout.evidence import EvidenceState
from reelway.platform.rollout.policy import Slice
from reelway.platform.rollout.sources import evidence_source
from reelway.platform.rollout.state import Phase
from reelway.platform.run_directory import RunDirectory
from reelway.platform.tokens import SLICE_BITS
from reelway.serving.metrics import SHORT_RELEASE, IngressMetrics, ShadowMetrics
from reelway.serving.outcomes.collector import OutcomeCollector


def test_evidence_matches_the_counts_of_router_and_collector(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    ingress, shadow, service = IngressMetrics(registry), ShadowMetrics(registry), Exporter("", "")
    canary = RELEASES[Arm.CANARY][:SHORT_RELEASE]
    state = state_of(
        id="r-1", canary_release=RELEASES[Arm.CANARY], stable_release=RELEASES[Arm.STABLE], phase=Phase.SHADOW
    )
    shown = [
        ShownImpression(i, i % 200, arm, 0.5, SLICE_BITS[Slice.NEW_VIEWERS] if i % 3 else 0)
        for arm, first in ((Arm.CANARY, 0), (Arm.STABLE, 600), (Arm.HOLDOUT, 1200))
        for i in range(first, first + 600)
    ]
    outcomes = [RawOutcome(one, OutcomeType.WATCH, 15_000.0 if one.id % 2 else 200.0) for one in shown]
    outcomes += [RawOutcome(one, OutcomeType.LIKE) for one in shown[::5]]
    (tmp_path / "serving.json").write_text(json.dumps({"internal_url": f"http://{service.address}"}))

    def pages() -> None:
        service.answer = {
            "/metrics": (200, generate_latest(registry)), "/v1/outcomes/metrics": (200, collector.metrics_text())
        }  # fmt: skip

    with (
        closing(OutcomeCollector(tmp_path / "sums.db", partial(open_topic, tmp_path / "events"))) as collector,
        closing(evidence_source(RunDirectory(tmp_path))) as source,
    ):
        ingress.requests.labels(canary, "canary", "ok").inc(3)
        shadow.requests.labels(canary, "compared").inc(1)
        pages()
        assert {e.state for e in source.fetch(POLICY, state, NOW).metrics.values()} == {EvidenceState.INSUFFICIENT}
        ingress.requests.labels(canary, "canary", "ok").inc(9)
        ingress.requests.labels(canary, "shadow", "degraded").inc(2)
        ingress.empty_slates.labels(canary, "canary").inc(1)
        for _ in range(11):
            ingress.latency.labels(canary, "canary").observe(0.03)
        shadow.requests.labels(canary, "compared").inc(4)
        for topic, record in (
            (Topic.EXPOSURES, exposure_record(shown)), (Topic.OUTCOMES, outcome_record(outcomes))
        ):  # fmt: skip
            with closing(open_topic(tmp_path / "events", topic, lambda: NOW)) as log:
                log.append([record])
        while collector.advance() or collector.advance():
            pass
        pages()
        snapshot = source.fetch(POLICY, state, NOW + 1)
        counted = collector.statistics("r-1")
    service.stop()
    errors, empty, p99 = (snapshot.guardrails[name] for name in ("error_ratio", "empty_slate_ratio", "p99_ms"))
    assert (errors.events, errors.trials, empty.events, p99.trials) == (2, 11, 1, 11)
    assert p99.value == pytest.approx(25 + 25 * 0.99)
    assert snapshot.shadow_requests == 4
    for part in (Slice.OVERALL, Slice.NEW_VIEWERS):
        evidence = snapshot.metrics["long_watch_rate", part]
        assert evidence.state is EvidenceState.OK
        assert evidence.canary == counted[Arm.CANARY, part]["long_watch_rate"]
        assert evidence.stable == counted[Arm.STABLE, part]["long_watch_rate"]
    assert (
        snapshot.metrics["like_rate", Slice.OVERALL].canary.sum_y
        == counted[Arm.CANARY, Slice.OVERALL]["like_rate"].sum_y
    )
