"""Prometheus and Alertmanager with the chart's monitors, rules and alert route detect a faulty release.

This module has its own installation, so that the rollouts of the shared one do not depend on monitoring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.support.cluster.kubectl import ROOT, Kubectl
from tests.support.e2e.alert_latency import ERRORS, SLOW, measure_rollback
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.monitored_installation import BAR_S, BY_EVIDENCE, ONLY_ALERTS, MonitoredInstallation, monitored
from tests.support.e2e.monitoring import JOBS, Monitoring
from tests.support.e2e.rollouts import begin, phase, status, wait_until_phase
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
BLIND = "telemetry down"
PANELS_WITHOUT_DATA = {"Mirrored slates: overlap and score drift, median"}
DASHBOARDS = ("rollout", "service")
"""Without ``live``: this installation has no event log on Kafka."""


@pytest.fixture(scope="module")
def watched(cluster: Cluster) -> Iterator[MonitoredInstallation]:
    with monitored(cluster, errors=2, slow=1) as service:
        yield service


def test_every_target_is_scraped(watched: MonitoredInstallation) -> None:
    namespace = watched.kubectl.namespace
    watched.monitoring.wait_until_scraped(namespace)
    assert {job: len(found) for job, found in watched.monitoring.targets(namespace).items()} == dict.fromkeys(JOBS, 1)
    until("every rule has been evaluated", lambda: _health(watched) == {"ok"}, 90, lambda: str(_health(watched)))
    names = {rule["name"] for rule in watched.monitoring.rules(namespace)}
    assert {ERRORS, SLOW, "ReelwayOperatorSilent", "ReelwayTelemetryAbsent", "ReelwayViewersUnknown"} <= names


def test_alertmanager_rolls_a_failing_release_back(watched: MonitoredInstallation) -> None:
    release, began = watched.releases.errors[0], watched.load.now()
    begin(watched.kubectl, "errors", release, ONLY_ALERTS)
    wait_until_phase(watched.kubectl, "errors", "RolledBack", within_s=180)
    rollback = measure_rollback(watched.kubectl, watched.load, watched.monitoring, "errors", release, since=began)
    print(f"{rollback.total_s:.1f} s: { ({hop: round(s, 2) for hop, s in rollback.hops.items()}) }; {rollback.reason}")
    assert rollback.by_alert
    assert rollback.total_s < BAR_S
    assert not len(watched.load.answers(release, since=rollback.ended + 0.001))


def test_default_guardrails_act_before_the_alert(watched: MonitoredInstallation) -> None:
    release, began = watched.releases.errors[1], watched.load.now()
    begin(watched.kubectl, "evidence", release, BY_EVIDENCE)
    wait_until_phase(watched.kubectl, "evidence", "RolledBack", within_s=180)
    rollback = measure_rollback(watched.kubectl, watched.load, watched.monitoring, "evidence", release, since=began)
    print(f"{rollback.total_s:.1f} s: { ({hop: round(s, 2) for hop, s in rollback.hops.items()}) }; {rollback.reason}")
    assert not rollback.by_alert
    assert "error_ratio" in rollback.reason
    assert rollback.total_s < BAR_S


def test_alertmanager_rolls_a_slow_release_back(watched: MonitoredInstallation) -> None:
    release, began = watched.releases.slow[0], watched.load.now()
    begin(watched.kubectl, "slow", release, ONLY_ALERTS)
    wait_until_phase(watched.kubectl, "slow", "RolledBack", within_s=300)
    reason = status(watched.kubectl, "slow")["reason"]
    took = status(watched.kubectl, "slow")["history"][-1]["time"] - began
    print(f"{took:.1f} s since the rollout was created: {reason}")
    assert SLOW in reason or ERRORS in reason  # a late ranker degrades the slate, too


def test_every_dashboard_panel_has_data(watched: MonitoredInstallation) -> None:
    """Except the panel on mirrored traffic, because this installation mirrors none."""
    empty = []
    for name in DASHBOARDS:
        path = ROOT / "charts/reelway/files/dashboards" / f"{name}.json"
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expr = target["expr"].replace("$namespace", watched.kubectl.namespace)
                if not watched.monitoring.query(re.sub(r"\$__rate_interval", "5m", expr)):
                    empty.append(panel["title"])
    print(f"panels without data: {empty}")
    assert set(empty) <= PANELS_WITHOUT_DATA


def test_prometheus_outage_holds_the_canary(watched: MonitoredInstallation) -> None:
    kubectl, monitoring = watched.kubectl, watched.monitoring
    if not monitoring.own:
        pytest.skip("tests do not stop the Prometheus of a cluster other than the node")
    policy = {**BY_EVIDENCE, "steps": [{"weight_percent": 20, "hold_s": 3600}, {"weight_percent": 50, "hold_s": 3600}],
              "evidence_max_age_s": 15}  # fmt: skip
    begin(kubectl, "blind", watched.releases.sound[1], policy)
    wait_until_phase(kubectl, "blind", "Stepping", "Holding")
    _wait_until_evidence_has(kubectl, "blind", BLIND, present=False)
    with _stopped(monitoring):
        _wait_until_evidence_has(kubectl, "blind", BLIND, present=True)
        held_since = watched.load.now()
        until("the canary is held for 20 s", lambda: watched.load.now() > held_since + 20, 60)
        current = status(kubectl, "blind")
        assert current["weights"]["canary"] == 2000, current
        assert phase(kubectl, "blind") in ("Stepping", "Holding")
        assert "Prometheus" in json.dumps(current), current
    monitoring.wait_until_scraped(kubectl.namespace)
    _wait_until_evidence_has(kubectl, "blind", BLIND, present=False)
    assert status(kubectl, "blind")["weights"]["canary"] == 2000
    kubectl.run("delete", "releaserollout", "blind", "--timeout=60s")


def _health(watched: MonitoredInstallation) -> set[str]:
    return {rule["health"] for rule in watched.monitoring.rules(watched.kubectl.namespace)}


def _wait_until_evidence_has(kubectl: Kubectl, name: str, word: str, *, present: bool) -> None:
    def evidence() -> str:
        return json.dumps(status(kubectl, name).get("evidence") or {})

    until(
        f"evidence of {name} {'has' if present else 'lacks'} {word!r}",
        lambda: (word in evidence()) is present,
        90,
        evidence,
    )


@contextmanager
def _stopped(monitoring: Monitoring) -> Iterator[None]:
    """Scales Prometheus to zero for the block. Its samples are lost."""
    pods = ("get", "pods", "-l", "app.kubernetes.io/name=prometheus", "-o", "name")
    _scale(monitoring, 0)
    try:
        until("Prometheus is stopped", lambda: "pod/" not in monitoring.kubectl.run(*pods), 60)
        yield
    finally:
        _scale(monitoring, 1)
        monitoring.kubectl.run("wait", "prometheus/node", "--for=condition=Available", "--timeout=80s")


def _scale(monitoring: Monitoring, replicas: int) -> None:
    patch = json.dumps({"spec": {"replicas": replicas}})
    monitoring.kubectl.run("patch", "prometheus", "node", "--type=merge", "-p", patch)
