"""The local controller as a process: its lock, its record file, a clean end, and a restart after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.rollout.canary_events import RELEASE, STABLE
from tests.support.rollout.controller_environment import QUICK, firing
from tests.support.rollout.webhook_requests import payload

from reelway.platform.errors import RolloutError
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.local_controller import ControllerSettings, run_controller
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.decision import start_state
from reelway.platform.rollout.state import Phase

START = (
    "import sys, pathlib\n"
    "from reelway.platform.telemetry import configure_logging\n"
    "from reelway.platform.rollout.control.local_controller import ControllerSettings, run_controller\n"
    "configure_logging()\n"
    "run_controller(ControllerSettings(run=pathlib.Path(sys.argv[1]), interval_s=0.2))\n"
)


@contextmanager
def controller_process(run: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Runs a controller as a child process that listens; kills it at the end of the block."""
    process = subprocess.Popen([sys.executable, "-c", START, run], stderr=subprocess.PIPE, text=True)
    record = run / "rollout" / "controller.json"
    try:
        deadline = time.monotonic() + 60
        while not (record.exists() and (known := json.loads(record.read_text()))["pid"] == process.pid):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process, known
    finally:
        process.kill()
        process.communicate()


def deliver(run: Path, url: str, **changes: str) -> httpx.Response:
    token = (run / "keys" / "webhook.token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.post(f"{url}/api/v1/alerts", json=payload(**changes), headers=headers, timeout=10)


def test_restarted_controller_has_the_alerts_of_a_killed_one(tmp_path: Path) -> None:
    store = SqliteRolloutStore(tmp_path / "rollout" / "state.db")
    with controller_process(tmp_path) as (process, known):
        assert deliver(tmp_path, known["url"]).json() == {"alerts": 1, "relevant": 0, "changed": False}
        assert httpx.get(known["url"] + "/healthz").status_code == 200
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "rollout" / "controller.json").exists()  # a killed process removes nothing
    state = start_state(QUICK, rollout_id="r", canary_release=RELEASE, stable_release=STABLE, now=1.0)
    store.create(state, QUICK)
    AlertRegistry(store).deliver([firing(RELEASE, 2.0)])  # as the killed process does before it answers
    with controller_process(tmp_path) as (process, known):
        deadline = time.monotonic() + 20
        while store.get("r").state.phase is not Phase.ROLLING_BACK:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        metrics = httpx.get(known["url"] + "/metrics").text
        assert 'reelway_rollout_phase{kind="rolling_back"} 1.0' in metrics
        assert re.search(r'reelway_rollout_failures_total\{kind="apply"\} [1-9]', metrics)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert process.stderr is not None
        lines = process.stderr.read()
    assert not (tmp_path / "rollout" / "controller.json").exists()
    assert re.search(r"r roll_back: guardrail: .*CanaryErrors", lines)
    assert lines.count("serving.json does not exist") <= 2  # logged when the failure begins, not at every reconcile
    assert "Traceback" not in lines
    assert [entry.action for entry in store.history()] == ["prepare", "roll_back"]


def test_second_controller_of_a_run_is_rejected(tmp_path: Path) -> None:
    stop = threading.Event()
    first = threading.Thread(target=run_controller, args=(ControllerSettings(run=tmp_path, interval_s=0.05), stop))
    first.start()
    try:
        record = tmp_path / "rollout" / "controller.json"
        deadline = time.monotonic() + 20
        while not record.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        url = json.loads(record.read_text())["url"]
        with pytest.raises(RolloutError, match=f"has a controller already .process {os.getpid()} at {url}"):
            run_controller(ControllerSettings(run=tmp_path))
    finally:
        stop.set()
        first.join(20)
    assert not first.is_alive()
    assert not record.exists()
    after = threading.Event()
    after.set()
    run_controller(ControllerSettings(run=tmp_path), after)  # the first one has released its lock
