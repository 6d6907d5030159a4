"""Metrics of several processes in one directory: sums, gauges of dead processes, names and labels."""

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


def test_dead_processes_keep_counters_but_lose_gauges(tmp_path: Path) -> None:
    environment = {**os.environ, metrics.FOLDER_VARIABLE: str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", PROCESS], env=environment, check=True, timeout=60)
    assert list(tmp_path.glob("gauge_live*.db"))
    text = metrics.render_metrics(tmp_path, CollectorRegistry()).decode()
    assert re.search(r'reelway_ranking_candidates_total\{release="r{12}"\} 10.0', text)
    assert "reelway_ranking_queue_requests" not in text


def test_metrics_without_a_directory_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.FOLDER_VARIABLE, raising=False)
    registry = CollectorRegistry()
    metrics.RankingMetrics(registry, "release").candidates.inc(3)
    assert metrics.multiprocess_dir() is None
    assert b'reelway_ranking_candidates_total{release="release"} 3.0' in metrics.render_metrics(None, registry)


def test_metric_names_have_a_stage_prefix_and_unit_suffix() -> None:
    registry = CollectorRegistry()
    for kind in (metrics.RetrievalMetrics, metrics.RankingMetrics, metrics.RerankingMetrics):
        kind(registry, "release")
    metrics.IngressMetrics(registry)
    names = [family.name for family in registry.collect()]
    assert len(names) > 10
    for name in names:
        assert re.match(r"reelway_(ingress|retrieval|ranking|reranking)_", name)


def test_files_of_dead_processes_are_merged_into_one(tmp_path: Path) -> None:
    environment = {**os.environ, metrics.FOLDER_VARIABLE: str(tmp_path)}
    for processes in (2, 3):  # the second merge adds to the first
        for _ in range(processes):
            subprocess.run([sys.executable, "-c", PROCESS], env=environment, check=True, timeout=60)
        assert len(list(tmp_path.glob("*.db"))) > 2
        text = metrics.render_metrics(tmp_path, CollectorRegistry()).decode()
        assert {file.name for file in tmp_path.glob("*.db")} == {"counter_0.db", "histogram_0.db"}
    assert re.search(r'reelway_ranking_candidates_total\{release="r{12}"\} 25.0', text)
    assert metrics.render_metrics(tmp_path, CollectorRegistry()).decode() == text


def test_file_of_a_living_process_is_not_merged(tmp_path: Path) -> None:
    environment = {**os.environ, metrics.FOLDER_VARIABLE: str(tmp_path)}
    living = [sys.executable, "-c", PROCESS + "print('counted', flush=True)\nimport time; time.sleep(60)"]
    with subprocess.Popen(living, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"counted\n"
            text = metrics.render_metrics(tmp_path, CollectorRegistry()).decode()
            assert 'reelway_ranking_candidates_total{release="rrrrrrrrrrrr"} 5.0' in text
            assert "reelway_ranking_queue_requests 7.0" in text
            assert (tmp_path / f"counter_{process.pid}.db").exists()
        finally:
            process.kill()
