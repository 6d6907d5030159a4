"""The streams, the repeated parity replay and live traffic end in time on stop signals and leave nothing."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.pipelines.fake_service import FakeService, running
from tests.support.process_life import SIGNALS, MarkedCommand, exit_codes, marked_command, printed

from reelway.pipelines.datasets.store import write_dataset
from reelway.pipelines.simulation.config import SimulationConfig
from reelway.pipelines.simulation.simulate_log import simulate
from reelway.platform.cli.processes import reelway_command
from reelway.platform.rollout.traffic.routing import Routing

CONFIG = SimulationConfig(viewers=400, videos=300, creators=30, days=4, impressions=4_000)


@pytest.fixture
def run(built: Any, tmp_path: Path) -> Path:
    shutil.copytree(built.run.path, tmp_path / "run")
    return tmp_path / "run"


def ended(
    arguments: Sequence[str], log: Path, ready: Callable[[MarkedCommand], bool], number: signal.Signals, *, group: bool
) -> int | None:
    """Runs the command until it is ready, stops it, and returns its exit code."""
    with marked_command(reelway_command(*arguments), log, ready) as command:
        ending = command.stop(number, group=group)
        assert ending.clean, (ending, log.read_text())
        assert "Traceback" not in log.read_text()
    return ending.code


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), SIGNALS)
def test_stream_ends_in_time_without_leftovers(run: Path, tmp_path: Path, number: signal.Signals, group: bool) -> None:
    def started(_: MarkedCommand) -> bool:
        return (run / "stream" / "state.db").exists()

    assert ended(("stream", "--run", str(run)), tmp_path / "log", started, number, group=group) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), SIGNALS)
def test_overlay_ends_in_time_without_leftovers(run: Path, tmp_path: Path, number: signal.Signals, group: bool) -> None:
    def started(_: MarkedCommand) -> bool:
        return (run / "stream" / "lists.npz").exists()

    assert ended(("stream", "overlay", "--run", str(run)), tmp_path / "log", started, number, group=group) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), SIGNALS)
def test_parity_replay_ends_in_time_without_leftovers(
    run: Path, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    command = ("features", "parity", "--run", str(run), "--interval", "60")
    assert ended(command, tmp_path / "log", printed("vectors,"), number, group=group) in exit_codes(number)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), SIGNALS)
def test_traffic_on_a_hanging_service_ends_in_time(tmp_path: Path, number: signal.Signals, group: bool) -> None:
    """Each request takes longer than the limit, so that the requests in flight do not end on their own."""
    log, run, report = simulate(CONFIG, 3), tmp_path / "run", tmp_path / "report.json"
    write_dataset(run / "dataset", log.tables, log.info, log.dimensions)
    with running(FakeService(Routing.single_release("a" * 64), CONFIG.videos, delay_s=40.0)) as service:
        (run / "serving.json").write_text(json.dumps({"url": service.url, "internal_url": service.url}))
        command = ("traffic", "--run", str(run), "--report", str(report), "--timeout", "60")
        assert ended(command, tmp_path / "log", lambda _: report.exists(), number, group=group) == 0
    assert json.loads(report.read_text())["running"] is False
