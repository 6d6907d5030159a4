"""Runs the operator in this process against a real API server and a fake Serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.cluster.fake_serve import GOOD, FakeServe
from tests.support.cluster.rollout_manifests import QUICK, rollout

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.cluster.rollout_operator import RolloutOperator
from reelway.platform.settings import load_settings

TOKEN = "a-token-of-this-test"


def settings_of(serve: FakeServe, tmp_path: Path, **more: Any) -> OperatorSettings:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    document = {
        "identity": "operator-0",
        "interval_s": 0.1,
        "webhook": {"token_file": token},
        "ray": {"trusted_hosts": ["127.0.0.1"], "dashboard_url": serve.url, "internal_url": serve.url},
    }
    return load_settings(OperatorSettings, None, {**document, **more})


@contextmanager
def operating(api: KubeApi, settings: OperatorSettings) -> Iterator[RolloutOperator]:
    """Runs an operator in this process and stops it as SIGTERM does."""
    operator, stop = RolloutOperator(api, settings), threading.Event()
    thread = threading.Thread(target=operator.run, args=(stop,))
    thread.start()
    try:
        yield operator
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def over(serve: FakeServe, name: str = "one", release: str = GOOD, **spec: Any) -> dict[str, Any]:
    return rollout(name, release, backend={"serve": {"api": serve.url, "url": serve.url}}, **spec)


def held(weight: int = 10) -> dict[str, Any]:
    """A policy that stays at its first step for an hour."""
    return {**QUICK, "steps": [{"weight_percent": weight, "hold_s": 3600}]}


def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)
