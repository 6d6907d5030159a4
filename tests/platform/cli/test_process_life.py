"""Commands that run on end in time on SIGTERM, SIGINT and SIGHUP, to the process and to its group, and leave nothing.

The same for commands of the other members: ``tests/pipelines/features/test_process_life.py``,
``tests/serving/test_serve_process_life.py``, ``tests/serving/test_rank_server_lifecycle.py``.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.process_life import SIGNALS, MarkedCommand, exit_codes, marked_command, printed
from tests.support.rollout.canary_events import RELEASE, STABLE
from tests.support.rollout.controller_environment import QUICK

from reelway.platform.cli.processes import reelway_command
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.decision import start_state

JOB = {
    "metadata": {
        "name": "rw-train-x", "creationTimestamp": "2026-03-01T10:00:00Z",
        "labels": {"reelway.dev/job": "train", "reelway.dev/run": "production"},
    },
    "spec": {"entrypoint": "reelway train"},
    "status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command that runs on, when it is ready, and whether it ends with success on a stop signal."""

    arguments: Sequence[str]
    ready: Callable[[MarkedCommand], bool]
    ends_well: bool


@pytest.fixture
def api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApiServer]:
    fake = FakeApiServer()
    monkeypatch.setenv("KUBECONFIG", str(fake.write_kubeconfig(tmp_path / "kubeconfig")))
    yield fake
    fake.close()


def controller(run: Path, _server: FakeApiServer) -> Case:
    record = run / "rollout" / "controller.json"
    return Case(("rollout", "controller", "--run", str(run)), lambda _: record.exists(), ends_well=True)


def watch(run: Path, _server: FakeApiServer) -> Case:
    store = SqliteRolloutStore(run / "rollout" / "state.db")
    store.create(start_state(QUICK, rollout_id="r", canary_release=RELEASE, stable_release=STABLE, now=1.0), QUICK)
    store.close()
    return Case(("rollout", "watch", "--run", str(run)), printed("WARNING"), ends_well=False)


def catalogue(run: Path, _server: FakeApiServer) -> Case:
    return Case(("catalogue", "serve", "--run", str(run), "--port", "0"), printed("catalogue of"), ends_well=True)


def operator(run: Path, _server: FakeApiServer) -> Case:
    settings: dict[str, Any] = {"webhook": {"host": "127.0.0.1", "port": 0, "token_file": str(run / "token")}}
    path = run / "operator.yaml"
    path.write_text(yaml.safe_dump(settings))
    return Case(("operator", "-n", "test", "--config", str(path)), printed("webhook at"), ends_well=True)


def follow(_run: Path, server: FakeApiServer) -> Case:
    server.put("/apis/ray.io/v1/namespaces/test/rayjobs/rw-train-x", JOB)
    return Case(("jobs", "follow", "rw-train-x", "-n", "test"), printed("job rw-train-x: running"), ends_well=False)


def demo(run: Path, _server: FakeApiServer) -> Case:
    def step_runs(command: MarkedCommand) -> bool:
        return len(command.processes()) > 2

    return Case(("demo", "--run", str(run)), step_runs, ends_well=False)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), SIGNALS)
@pytest.mark.parametrize("prepare", [controller, watch, catalogue, operator, follow, demo])
def test_command_ends_in_time_without_leftovers(
    prepare: Callable[[Path, FakeApiServer], Case],
    number: signal.Signals,
    group: bool,
    run_with_releases: Path,
    api_server: FakeApiServer,
    tmp_path: Path,
) -> None:
    case = prepare(run_with_releases, api_server)
    with marked_command(reelway_command(*case.arguments), tmp_path / "log", case.ready) as command:
        ending = command.stop(number, group=group)
        assert ending.clean, (ending, command.log.read_text())
        assert ending.code in ({0} if case.ends_well else exit_codes(number)), command.log.read_text()
        assert "Traceback" not in command.log.read_text()
