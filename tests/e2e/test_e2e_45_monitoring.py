"""Prometheus and Alertmanager with the chart's monitors, rules and alert route detect a faulty release.

The scene has an installation of its own, so that the flow's rollouts are independent of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.support.cluster.kubectl import ROOT, Kubectl
from tests.support.e2e.alert_latency import ERRORS, SLOW, rollback_of
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.monitored_installation import BAR_S, BY_EVIDENCE, ONLY_ALERTS, MonitoredInstallation, monitored
from tests.support.e2e.monitoring import JOBS, Monitoring
from tests.support.e2e.rollouts import begin, phase, status, until_phase
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
BLIND = "telemetry down"
UNANSWERED = {"Mirrored slates: overlap and score drift, median"}


@pytest.fixture(scope="module")
def watched(cluster: Cluster) -> Iterator[MonitoredInstallation]:
    with monitored(cluster, errors=2, slow=1) as service:
        yield service


def test_every_target_is_scraped(watched: MonitoredInstallation) -> None:
    namespace = watched.kubectl.namespace
    watched.monitoring.until_scraped(namespace)
    assert {job: len(found) for job, found in watched.monitoring.targets(namespace).items()} == dict.fromkeys(JOBS, 1)
    until("every rule has been evaluated", lambda: _health(watched) == {"ok"}, 90, lambda: str(_health(watched)))
    names = {rule["name"] for rule in watched.monitoring.rules(namespace)}
    assert {ERRORS, SLOW, "ReelwayOperatorSilent", "ReelwayTelemetryAbsent", "ReelwayViewersUnknown"} <= names


def test_alertmanager_rolls_a_failing_release_back(watched: MonitoredInstallation) -> None:
    release, began = watched.releases.errors[0], watched.load.now()
    begin(watched.kubectl, "errors", release, ONLY_ALERTS)
    until_phase(watched.kubectl, "errors", "RolledBack", within_s=180)
    seen = rollback_of(watched.kubectl, watched.load, watched.monitoring, "errors", release, since=began)
    print(f"{seen.total_s:.1f} s: { ({hop: round(s, 2) for hop, s in seen.hops.items()}) }; {seen.reason}")
    assert seen.by_alert
    assert seen.total_s < BAR_S
    assert not len(watched.load.answers(release, since=seen.ended + 0.001))


def test_default_guardrails_act_before_the_alert(watched: MonitoredInstallation) -> None:
    release, began = watched.releases.errors[1], watched.load.now()
    begin(watched.kubectl, "evidence", release, BY_EVIDENCE)
    until_phase(watched.kubectl, "evidence", "RolledBack", within_s=180)
    seen = rollback_of(watched.kubectl, watched.load, watched.monitoring, "evidence", release, since=began)
    print(f"{seen.total_s:.1f} s: { ({hop: round(s, 2) for hop, s in seen.hops.items()}) }; {seen.reason}")
    assert not seen.by_alert
    assert "error_ratio" in seen.reason
    assert seen.total_s < BAR_S


def test_a_slow_release_is_taken_back_through_alertmanager(watched: MonitoredInstallation) -> None:
    release, began = watched.releases.slow[0], watched.load.now()
    begin(watched.kubectl, "slow", release, ONLY_ALERTS)
    until_phase(watched.kubectl, "slow", "RolledBack", within_s=300)
    reason = status(watched.kubectl, "slow")["reason"]
    took = status(watched.kubectl, "slow")["history"][-1]["time"] - began
    print(f"{took:.1f} s since the rollout was made: {reason}")
    assert SLOW in reason or ERRORS in reason  # a ranker that is late is a degraded slate, too


def test_every_panel_of_the_dashboards_is_answered(watched: MonitoredInstallation) -> None:
    """Those about mirrored traffic have nothing to say: there is none."""
    empty = []
    for path in sorted((ROOT / "charts/reelway/files/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expr = target["expr"].replace("$namespace", watched.kubectl.namespace)
                found = watched.monitoring.query(re.sub(r"\$__rate_interval", "5m", expr))
                if not found:
                    empty.append(panel["title"])
    print(f"answered with nothing: {empty}")
    assert set(empty) <= UNANSWERED


def test_a_prometheus_that_is_gone_holds_the_canary_and_neither_promotes_nor_condemns_it(
    watched: MonitoredInstallation,
) -> None:
    kubectl, monitoring = watched.kubectl, watched.monitoring
    if not monitoring.own:
        pytest.skip("this cluster's Prometheus is not the tests' to take away")
    policy = {**BY_EVIDENCE, "steps": [{"weight_percent": 20, "hold_s": 3600}, {"weight_percent": 50, "hold_s": 3600}],
              "evidence_max_age_s": 15}  # fmt: skip
    begin(kubectl, "blind", watched.releases.sound[1], policy)
    until_phase(kubectl, "blind", "Stepping", "Holding")
    _until_told(kubectl, "blind", BLIND, present=False)
    with _gone(monitoring):
        _until_told(kubectl, "blind", BLIND, present=True)
        held_since = watched.load.now()
        until("it is held for a while", lambda: watched.load.now() > held_since + 20, 60)
        seen = status(kubectl, "blind")
        assert seen["weights"]["canary"] == 2000, seen
        assert phase(kubectl, "blind") in ("Stepping", "Holding")
        assert "Prometheus" in json.dumps(seen), seen
    monitoring.until_scraped(kubectl.namespace)
    _until_told(kubectl, "blind", BLIND, present=False)
    assert status(kubectl, "blind")["weights"]["canary"] == 2000
    kubectl.run("delete", "releaserollout", "blind", "--timeout=60s")


def _health(watched: MonitoredInstallation) -> set[str]:
    return {rule["health"] for rule in watched.monitoring.rules(watched.kubectl.namespace)}


def _until_told(kubectl: Kubectl, name: str, word: str, *, present: bool) -> None:
    def told() -> str:
        return json.dumps(status(kubectl, name).get("evidence") or {})

    until(f"{word} is {'said' if present else 'no more said'} of {name}", lambda: (word in told()) is present, 90, told)


@contextmanager
def _gone(monitoring: Monitoring) -> Iterator[None]:
    """Prometheus is taken away for the block, by its operator; what it had seen is lost."""
    pods = ("get", "pods", "-l", "app.kubernetes.io/name=prometheus", "-o", "name")
    _scale(monitoring, 0)
    try:
        until("Prometheus is gone", lambda: "pod/" not in monitoring.kubectl.run(*pods), 60)
        yield
    finally:
        _scale(monitoring, 1)
        monitoring.kubectl.run("wait", "prometheus/node", "--for=condition=Available", "--timeout=80s")


def _scale(monitoring: Monitoring, replicas: int) -> None:
    patch = json.dumps({"spec": {"replicas": replicas}})
    monitoring.kubectl.run("patch", "prometheus", "node", "--type=merge", "-p", patch)
