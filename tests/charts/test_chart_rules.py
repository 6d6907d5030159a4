"""Each alert fires on its own fault and on no other, evaluated by Prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.support.charts.chart_tool import rendered

MINUTES: Final = 400
FAULT_AT: Final = 370
Series = dict[str, list[float]]


NAMESPACE: Final = "reelway"
"""Namespace that the chart is rendered for."""


def rules(component: str = "monitoring") -> dict[str, list[Any]]:
    groups = [
        group
        for one in rendered("production-cpu", component)
        if one["kind"] == "PrometheusRule"
        for group in one["spec"]["groups"]
    ]
    return {"groups": groups}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)


def grows(before: float, after: float | None = None, since: int = FAULT_AT) -> list[float]:
    """Values of a counter, given its growth per minute before and since the fault."""
    values, total = [], 0.0
    for minute in range(MINUTES + 1):
        values.append(total)
        total += before if after is None or minute < since else after
    return values


def level(before: float, after: float | None = None) -> list[float]:
    return [before if after is None or minute < FAULT_AT else after for minute in range(MINUTES + 1)]


REQUESTS: Final = "reelway_ingress_requests_total"
LATENCY: Final = "reelway_ingress_latency_seconds"


def requests(outcome: str, arm: str = "stable", release: str = "aaaa") -> str:
    return f'{REQUESTS}{{arm="{arm}", release="{release}", outcome="{outcome}"}}'


def latency(le: str, arm: str = "stable", release: str = "aaaa") -> str:
    return f'{LATENCY}_bucket{{arm="{arm}", release="{release}", le="{le}"}}'


def count(arm: str = "stable", release: str = "aaaa") -> str:
    return f'{LATENCY}_count{{arm="{arm}", release="{release}"}}'


def healthy() -> Series:
    """Series of a healthy service with a canary."""
    series: Series = {}
    for arm, release, rate in (("stable", "aaaa", 600.0), ("canary", "bbbb", 120.0)):
        series |= {
            requests("ok", arm, release): grows(rate),
            requests("degraded", arm, release): grows(0),
            requests("failed", arm, release): grows(0),
            requests("context_only", arm, release): grows(rate * 0.02),
            latency("0.1", arm, release): grows(rate),
            latency("0.25", arm, release): grows(rate),
            latency("0.5", arm, release): grows(rate),
            latency("+Inf", arm, release): grows(rate),
            count(arm, release): grows(rate),
            f'reelway_ingress_empty_slates_total{{arm="{arm}", release="{release}"}}': grows(0),
        }
    for le in ("0.1", "0.5", "1", "+Inf"):
        series[f'reelway_shadow_score_drift_ratio_bucket{{release="bbbb", le="{le}"}}'] = grows(60)
    return series | {
        'reelway_shadow_score_drift_ratio_count{release="bbbb"}': grows(60),
        'reelway_ingress_faults_total{release="aaaa", stage="viewer_row", kind="error"}': grows(1),
        'reelway_ingress_faults_total{release="aaaa", stage="viewer_row", kind="unexpected"}': grows(0),
        "reelway_rollout_last_tick_timestamp_seconds": grows(60),
        'reelway_rollout_failures_total{kind="evidence"}': grows(0),
        'reelway_rollout_webhooks_total{outcome="stored"}': grows(1),
        'reelway_rollout_webhooks_total{outcome="unauthorised"}': grows(0),
        'reelway_rollout_suspicion{kind="silent viewers"}': level(0),
        'reelway_thread_failures_total{thread="releases"}': grows(0),
        'reelway_ingress_foreign_features_total{release="aaaa"}': level(0),
        'up{job="reelway-operator"}': level(1),
        'up{job="reelway-router", instance="a"}': level(1),
        'up{job="reelway-outcomes", instance="a"}': level(1),
        **healthy_live_parts(),
    }


def healthy_live_parts() -> Series:
    """Series of the event log's readers, the stream, the overlay, the catalogue API and the viewers' memory."""
    ages = (
        'reelway_outcomes_log_age_seconds{source="exposures"}', 'reelway_takedowns_age_seconds{pod="head"}',
        'reelway_takedowns_age_seconds{pod="worker"}', "reelway_uploads_age_seconds",
        'reelway_overlay_age_seconds{pod="worker", release="aaaa"}', "reelway_lists_age_seconds",
        'reelway_retrieval_lists_age_seconds{pod="worker", release="aaaa"}', "reelway_stream_lag_seconds",
    )  # fmt: skip
    counters = (
        'reelway_ingress_exposures_lost_total{arm="stable", release="aaaa"}',
        'reelway_outcomes_unreadable_records_total{source="exposures"}', "reelway_takedowns_unreadable_total",
        'reelway_uploads_refused_total{release="aaaa", kind="unreadable"}', "reelway_stream_faults_total",
        'reelway_stream_parked_records_total{kind="unreadable"}', 'reelway_ingress_memory_faults_total{kind="read"}',
        "reelway_ingress_memory_lost_total", "reelway_ingress_parity_samples_lost_total",
        "reelway_ingress_key_faults_total",
        "reelway_outcomes_memory_failures_total",
        "reelway_outcomes_memory_lost_total", "reelway_catalogue_faults_total", "reelway_uploads_faults_total",
        "reelway_uploads_unrepaired_total", "reelway_outcomes_dropped_arms_total",
    )  # fmt: skip
    return {
        **{name: level(2) for name in ages},
        **{name: grows(0) for name in counters},
        'reelway_stream_lag_records{topic="outcomes", partition="0"}': level(400),
        'reelway_stream_lag_records{topic="outcomes", partition="1"}': level(900),
        "reelway_stream_viewer_memory_complete": level(1),
        **{f'up{{job="reelway-{part}", instance="a"}}': level(1) for part in ("stream", "overlay", "catalogue")},
    }


# Alert, changed series, and minutes from the fault to the evaluation.
FAULTS: Final[list[tuple[str, Mapping[str, list[float]], int]]] = [
    ("ReelwayAvailabilityFastBurn", {requests("degraded"): grows(0, 200)}, 26),
    ("ReelwayAvailabilitySlowBurn", {requests("degraded"): grows(24)}, 30),
    ("ReelwayLatencyFastBurn", {latency("0.1"): grows(600, 300), latency("0.25"): grows(600, 300)}, 26),
    ("ReelwayLatencySlowBurn", {latency("0.1"): grows(552), latency("0.25"): grows(552)}, 30),
    ("ReelwayViewersUnknown", {requests("context_only"): grows(12, 400)}, 20),
    ("ReelwayScoresDrift", {
        f'reelway_shadow_score_drift_ratio_bucket{{release="bbbb", le="{le}"}}': grows(60, 5) for le in ("0.1", "0.5")
    }, 26),
    ("ReelwayViewerRowBug", {
        'reelway_ingress_faults_total{release="aaaa", stage="viewer_row", kind="unexpected"}': grows(0, 1)
    }, 6),
    ("ReelwayFeaturesForeign", {'reelway_ingress_foreign_features_total{release="aaaa"}': level(0, 1)}, 6),
    ("ReelwayThreadFails", {'reelway_thread_failures_total{thread="releases"}': grows(0, 1)}, 6),
    ("ReelwayViewerKeysUnread", {"reelway_ingress_key_faults_total": grows(0, 1)}, 12),
    ("ReelwayExposuresLost", {'reelway_ingress_exposures_lost_total{arm="stable", release="aaaa"}': grows(0, 1)}, 6),
    ("ReelwayParitySamplesLost", {"reelway_ingress_parity_samples_lost_total": grows(0, 1)}, 6),
    ("ReelwayOutcomeSumsBehind", {'reelway_outcomes_log_age_seconds{source="exposures"}': level(2, 200)}, 6),
    ("ReelwayEventLogUnreadable", {
        'reelway_outcomes_unreadable_records_total{source="exposures"}': grows(0, 1)
    }, 6),
    ("ReelwayArmsNotCounted", {"reelway_outcomes_dropped_arms_total": grows(0, 1)}, 6),
    ("ReelwayTakedownsNotEverywhere", {'reelway_takedowns_age_seconds{pod="worker"}': level(2, 30)}, 6),
    ("ReelwayTakedownsUnreadable", {"reelway_takedowns_unreadable_total": grows(0, 1)}, 6),
    ("ReelwayUploadsBehind", {"reelway_uploads_age_seconds": level(2, 90)}, 6),
    ("ReelwayUploadsRefused", {'reelway_uploads_refused_total{release="aaaa", kind="unreadable"}': grows(0, 1)}, 6),
    ("ReelwayOverlayWriterFails", {"reelway_uploads_faults_total": grows(0, 2)}, 12),
    ("ReelwayUploadsUnrepaired", {"reelway_uploads_unrepaired_total": grows(0, 1)}, 6),
    ("ReelwayOverlayStale", {'reelway_overlay_age_seconds{pod="worker", release="aaaa"}': level(2, 90)}, 6),
    ("ReelwayListsStale", {'reelway_retrieval_lists_age_seconds{pod="worker", release="aaaa"}': level(2, 150)}, 6),
    ("ReelwayStreamBehind", {"reelway_stream_lag_seconds": level(2, 90)}, 6),
    ("ReelwayStreamPartitionLags", {
        'reelway_stream_lag_records{topic="outcomes", partition="1"}': level(900, 9000)
    }, 12),
    ("ReelwayStreamFails", {"reelway_stream_faults_total": grows(0, 2)}, 12),
    ("ReelwayStreamRecordsParked", {'reelway_stream_parked_records_total{kind="unreadable"}': grows(0, 1)}, 6),
    ("ReelwayViewerMemoryFails", {'reelway_ingress_memory_faults_total{kind="read"}': grows(0, 20)}, 8),
    ("ReelwayViewerMemoryLost", {"reelway_ingress_memory_lost_total": grows(0, 1)}, 6),
    ("ReelwayViewerMemoryIncomplete", {"reelway_stream_viewer_memory_complete": level(1, 0)}, 14),
    ("ReelwayBlocksNotRemembered", {"reelway_outcomes_memory_failures_total": grows(0, 1)}, 6),
    ("ReelwayBlocksLost", {"reelway_outcomes_memory_lost_total": grows(0, 1)}, 6),
    ("ReelwayCatalogueFails", {"reelway_catalogue_faults_total": grows(0, 5)}, 6),
    ("ReelwayLivePartDown", {'up{job="reelway-overlay", instance="a"}': level(1, 0)}, 6),
    ("ReelwayOperatorSilent", {"reelway_rollout_last_tick_timestamp_seconds": grows(60, 0)}, 10),
    ("ReelwayOperatorSilent", {'up{job="reelway-operator"}': level(1, 0)}, 10),
    ("ReelwayOperatorFails", {'reelway_rollout_failures_total{kind="evidence"}': grows(0, 30)}, 16),
    ("ReelwayWebhookRefused", {'reelway_rollout_webhooks_total{outcome="unauthorised"}': grows(0, 2)}, 4),
    ("ReelwayEvidenceSuspected", {'reelway_rollout_suspicion{kind="silent viewers"}': level(0, 1)}, 10),
    ("ReelwayCanaryErrors", {requests("degraded", "canary", "bbbb"): grows(0, 60)}, 4),
    ("ReelwayCanaryEmptySlates", {
        'reelway_ingress_empty_slates_total{arm="canary", release="bbbb"}': grows(0, 30)
    }, 4),
    ("ReelwayCanarySlow", {
        latency("0.1", "canary", "bbbb"): grows(120, 114), latency("0.25", "canary", "bbbb"): grows(120, 114)
    }, 4),
    ("ReelwayTelemetryDown", {'up{job="reelway-router", instance="a"}': level(1, 0)}, 6),
]  # fmt: skip


def of_namespace(name: str, namespace: str) -> str:
    """The series with the label that a PodMonitor adds."""
    bare, _, labels = name.removesuffix("}").partition("{")
    return f'{bare}{{namespace="{namespace}"{", " if labels else ""}{labels}}}'


def firing(
    series: Mapping[str, list[float]], minute: int, folder: Path, *, neighbours: Mapping[str, list[float]] | None = None
) -> dict[str, dict[str, str]]:
    """Labels of the firing alerts by name. They are parsed from a failed expectation, all that promtool prints.

    Args:
        neighbours: series of another namespace in the same Prometheus.
    """
    all_series = {of_namespace(name, NAMESPACE): values for name, values in series.items()}
    all_series |= {of_namespace(name, "staging"): values for name, values in (neighbours or {}).items()}
    case = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "2m",
        "tests": [{
            "interval": "1m",
            "input_series": [
                {"series": name, "values": " ".join(f"{value:.2f}" for value in values)}
                for name, values in all_series.items()
            ],
            "promql_expr_test": [{"expr": 'ALERTS{alertstate="firing"}', "eval_time": f"{minute}m", "exp_samples": [
                {"labels": '{never="expected"}', "value": 1}
            ]}],
        }],
    }  # fmt: skip
    # promtool evaluates all groups at the same interval.
    groups = [{name: value for name, value in group.items() if name != "interval"} for group in rules()["groups"]]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    (folder / "case.yaml").write_text(json.dumps(case))
    said = promtool("test", "rules", str(folder / "case.yaml"))
    text = said.stdout + said.stderr
    assert "got:" in text, text
    got = text.partition("got:")[2]
    return {
        labels["alertname"]: labels
        for labels in map(parsed, got.replace("ALERTS{", "\nALERTS{").splitlines())
        if labels
    }


def parsed(line: str) -> dict[str, str]:
    """Labels of a sample as promtool prints it."""
    if "alertname=" not in line:
        return {}
    inside = line[line.index("{") + 1 : line.rindex("}")]
    return dict(part.strip().replace('"', "").split("=", 1) for part in inside.split(",") if "=" in part)


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    said = promtool("check", "rules", str(tmp_path / "rules.yaml"))
    assert said.returncode == 0, said.stderr
    assert "SUCCESS" in said.stdout


def test_healthy_service_fires_no_alert(tmp_path: Path) -> None:
    assert firing(healthy(), MINUTES, tmp_path) == {}


@pytest.mark.parametrize(
    ("alert", "fault", "minutes"), FAULTS, ids=[f"{index}-{one[0]}" for index, one in enumerate(FAULTS)]
)
def test_fault_fires_its_alert_only(alert: str, fault: Mapping[str, list[float]], minutes: int, tmp_path: Path) -> None:
    series = healthy()
    assert fault.keys() <= series.keys()
    assert set(firing(series | dict(fault), FAULT_AT + minutes, tmp_path)) == {alert}


def test_only_canary_alerts_carry_the_release_label(tmp_path: Path) -> None:
    for alert, fault, minutes in FAULTS:
        if alert in ("ReelwayCanaryErrors", "ReelwayScoresDrift", "ReelwayAvailabilityFastBurn", "ReelwayOverlayStale"):
            labels = firing(healthy() | dict(fault), FAULT_AT + minutes, tmp_path)[alert]
            assert labels.get("release") == ("bbbb" if alert == "ReelwayCanaryErrors" else None), labels


def test_every_rule_carries_its_namespace() -> None:
    for group in rules()["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["namespace"] == NAMESPACE, rule


def test_faults_of_another_namespace_fire_no_alert(tmp_path: Path) -> None:
    neighbours = healthy()
    for _, fault, _ in FAULTS:
        neighbours |= dict(fault)
    for minutes in (6, 26):
        assert firing(healthy(), FAULT_AT + minutes, tmp_path, neighbours=neighbours) == {}


def test_canary_rules_are_evaluated_at_the_scrape_interval() -> None:
    intervals = {group["name"]: group.get("interval") for group in rules()["groups"]}
    assert intervals["reelway-canary"] == intervals["reelway-rollout-telemetry"] == "5s"
    assert intervals["reelway-service-levels"] is None


def test_missing_targets_fire_an_alert(tmp_path: Path) -> None:
    series = {name: values for name, values in healthy().items() if 'job="reelway-router"' not in name}
    assert set(firing(series, MINUTES, tmp_path)) == {"ReelwayTelemetryAbsent"}


def test_every_alert_has_a_fault() -> None:
    alerts = {rule["alert"] for group in rules()["groups"] for rule in group["rules"] if "alert" in rule}
    assert alerts == {one[0] for one in FAULTS} | {"ReelwayTelemetryAbsent"}


def test_latency_bound_is_a_bound_of_the_histogram() -> None:
    from reelway.platform.telemetry import LATENCY_BUCKETS_S

    expressions = [rule["expr"] for group in rules()["groups"] for rule in group["rules"] if "record" in rule]
    bounds = {text.partition('le="')[2].partition('"')[0] for text in expressions if 'le="' in text}
    assert {float(bound) for bound in bounds} <= set(LATENCY_BUCKETS_S)
    assert bounds
    whole = [rule["expr"] for group in rules("slow-bound")["groups"] for rule in group["rules"] if "record" in rule]
    assert any('le="1.0"' in text for text in whole), "exporters write whole seconds with a decimal point"


def test_missing_pods_of_a_live_part_fire_an_alert(tmp_path: Path) -> None:
    series = {name: values for name, values in healthy().items() if 'job="reelway-catalogue"' not in name}
    fired = firing(series, MINUTES, tmp_path)
    assert set(fired) == {"ReelwayLivePartDown"}
    assert fired["ReelwayLivePartDown"]["job"] == "reelway-catalogue"


@pytest.mark.parametrize(("component", "parts"), [("not-live", None), ("live-in-part", None), ("live", 3)])
def test_live_parts_that_do_not_run_have_no_alert_for_their_pods(component: str, parts: int | None) -> None:
    found = [one for group in rules(component)["groups"] for one in group["rules"] if "LivePartDown" in str(one)]
    assert [one["expr"].count("absent(") for one in found] == ([] if parts is None else [parts])
