"""A thread of the operator that ends with an unexpected exception ends the operator, so that a replica takes over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.cluster.fake_serve import FakeServe
from tests.support.cluster.rollout_manifests import rollout

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.leader_election import LeaderElector
from reelway.platform.cluster.operator_settings import (
    LeaseSettings,
    OperatorSettings,
    OperatorWebhookSettings,
    RaySettings,
)
from reelway.platform.cluster.rollout_operator import RolloutOperator
from reelway.platform.cluster.rollout_watch import RolloutWatch
from reelway.platform.errors import KubernetesError
from reelway.platform.rollout.control.controller import Controller


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RolloutOperator]:
    """An operator of a namespace with one rollout."""
    server, serve = FakeApiServer(), FakeServe()
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    (tmp_path / "token").write_text("a-token-of-this-test")
    server.apply(rollout("one", backend={"serve": {"api": serve.url, "url": serve.url}}))
    settings = OperatorSettings(
        identity="operator-0",
        interval_s=0.1,
        webhook=OperatorWebhookSettings(token_file=tmp_path / "token"),
        lease=LeaseSettings(duration_s=5),
        ray=RaySettings(trusted_hosts=("127.0.0.1",)),
    )
    yield RolloutOperator(KubeApi(), settings)
    serve.close()
    server.close()


@pytest.mark.parametrize(
    ("owner", "method", "thread", "reason"),
    [
        (Controller, "run", "controller", "the controller of serve/http://127.0.0.1"),
        (RolloutWatch, "run", "watch", "the watch of rollouts failed"),
        (LeaderElector, "renew_until", "lease", "the renewal of the lease failed"),
    ],
)
def test_failed_thread_ends_the_operator(
    operator: RolloutOperator,
    monkeypatch: pytest.MonkeyPatch,
    owner: type[object],
    method: str,
    thread: str,
    reason: str,
) -> None:
    def fail(*_: Any) -> None:
        raise RecursionError("an exception that nobody thought of")

    monkeypatch.setattr(owner, method, fail)
    before, ended = _failures(operator, thread), list[Exception]()

    def run() -> None:
        try:
            operator.run(threading.Event())
        except KubernetesError as error:
            ended.append(error)

    running = threading.Thread(target=run)
    running.start()
    running.join(30)
    assert not running.is_alive()
    assert str(ended[0]).startswith(reason)
    assert _failures(operator, thread) == before + 1


def _failures(operator: RolloutOperator, thread: str) -> float:
    """Counted failures in the operator's ``/metrics``."""
    for family in text_string_to_metric_families(operator.metrics.render().decode()):
        for sample in family.samples:
            if sample.name == "reelway_thread_failures_total" and sample.labels == {"thread": thread}:
                return float(sample.value)
    return 0.0
