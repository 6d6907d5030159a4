"""Metrics of several processes in one folder: added up, levels of the dead forgotten, names and labels bounded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from reelway.serving import metrics

PROCESS = """
from prometheus_client import CollectorRegistry
from reelway.platform.telemetry import gauge
from reelway.serving.metrics import RankingMetrics
registry = CollectorRegistry()
RankingMetrics(registry, "r" * 64).candidates.inc(5)
gauge("reelway_ranking_queue_requests", "Waiting.", [], registry).set(7)
"""


def test_counts_of_dead_processes_stay_and_their_levels_go(tmp_path: Path) -> None:
    environment = {**os.environ, metrics.FOLDER_VARIABLE: str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", PROCESS], env=environment, check=True, timeout=60)
    assert list(tmp_path.glob("gauge_live*.db"))
    text = metrics.scrape(tmp_path, CollectorRegistry()).decode()
    assert re.search(r'reelway_ranking_candidates_total\{release="r{12}"\} 10.0', text)
    assert "reelway_ranking_queue_requests" not in text


def test_without_a_shared_folder_the_process_shows_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.FOLDER_VARIABLE, raising=False)
    registry = CollectorRegistry()
    metrics.RankingMetrics(registry, "release").candidates.inc(3)
    assert metrics.shared_folder() is None
    assert b'reelway_ranking_candidates_total{release="release"} 3.0' in metrics.scrape(None, registry)


def test_every_metric_starts_with_its_stage_and_ends_with_its_unit() -> None:
    registry = CollectorRegistry()
    for kind in (metrics.RetrievalMetrics, metrics.RankingMetrics, metrics.RerankingMetrics):
        kind(registry, "release")
    metrics.IngressMetrics(registry)
    names = [family.name for family in registry.collect()]
    assert len(names) > 10
    for name in names:
        assert re.match(r"reelway_(ingress|retrieval|ranking|reranking)_", name)
