"""Metric names and labels outside the naming scheme are rejected."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from reelway.platform.telemetry import counter, gauge, histogram


def test_metrics_are_exposed_with_their_name_and_labels() -> None:
    registry = CollectorRegistry()
    candidates = counter("reelway_ranking_candidates_total", "Candidates.", ["release", "arm"], registry)
    candidates.labels("r", "stable").inc(3)
    latency = histogram("reelway_ranking_latency_seconds", "Latency.", ["release"], registry, buckets=[0.1, 1])
    latency.labels("r").observe(0.5)
    gauge("reelway_serving_videos_count", "Videos.", [], registry).set(7)
    text = generate_latest(registry).decode()
    assert 'reelway_ranking_candidates_total{arm="stable",release="r"} 3.0' in text
    assert 'reelway_ranking_latency_seconds_bucket{le="1.0",release="r"} 1.0' in text
    assert "reelway_serving_videos_count 7.0" in text


@pytest.mark.parametrize("name", ["ranking_candidates_total", "reelway_Ranking_total", "reelway", "reelway_total"])
@pytest.mark.parametrize("make", [counter, gauge, histogram])
def test_name_outside_the_scheme_is_rejected(make: object, name: str) -> None:
    with pytest.raises(ValueError, match="does not have the form reelway_<stage>_<thing>_<unit>"):
        make(name, "x", [], CollectorRegistry())  # type: ignore[operator]


@pytest.mark.parametrize("label", ["viewer", "viewer_id", "video_id", "request"])
@pytest.mark.parametrize("make", [counter, gauge, histogram])
def test_unbounded_label_is_rejected(make: object, label: str) -> None:
    with pytest.raises(ValueError, match=label):
        make("reelway_ranking_candidates_total", "x", ["release", label], CollectorRegistry())  # type: ignore[operator]
