"""The shipped alert rules and scrape example, checked with promtool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from reelway.platform.rollout import metric_names
from reelway.platform.rollout.rules import canary_rules, scrape_example
from reelway.platform.rollout.sources.direct_scrape import PATHS

HERE = Path(__file__).parent


def promtool(*arguments: str) -> str:
    """Runs promtool, which must succeed, and returns its output."""
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("no promtool on the PATH; `make system-packages` installs it with prometheus")
    process = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(canary_rules())
    assert "5 rules found" in promtool("check", "rules", str(tmp_path / "rules.yaml"))


def test_each_alert_fires_on_its_own_fault_only() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(HERE / "canary.rules.test.yaml"))


def test_every_alert_except_telemetry_alerts_has_a_release() -> None:
    """An alert with a release label rolls it back, and a telemetry fault must not."""
    groups = {group["name"]: group["rules"] for group in yaml.safe_load(canary_rules())["groups"]}
    assert all("release" in rule["expr"] for rule in groups["reelway-canary"])
    assert not any("release" in rule["expr"] for rule in groups["reelway-rollout-telemetry"])
    assert not any("release" in rule["labels"] for rules in groups.values() for rule in rules)


def test_rules_use_only_series_that_serving_exposes() -> None:
    text = canary_rules()
    for name in (metric_names.REQUESTS, metric_names.EMPTY_SLATES, f"{metric_names.LATENCY}_bucket"):
        text = text.replace(name, "")
    assert "reelway_" not in text
    assert "|".join(metric_names.FAULTY_OUTCOMES) in text


def test_example_scrapes_both_endpoints_under_the_expected_jobs(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yaml").write_text(scrape_example())
    promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yaml"))
    jobs = {job["job_name"]: job["metrics_path"] for job in yaml.safe_load(scrape_example())["scrape_configs"]}
    assert jobs == PATHS
