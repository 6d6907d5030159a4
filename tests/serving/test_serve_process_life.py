"""`reelway serve` under SIGTERM, SIGINT and SIGHUP, to the process and to its group: it leaves nothing.

`make bench-process-life` repeats this and measures the times.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
from tests.support.process_life import SIGNALS, MarkedCommand, exit_codes, marked_command
from tests.support.serving.served_run import make_run

from reelway.platform.cli.processes import reelway_command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


def serving(run: Path) -> tuple[list[str], Path]:
    return reelway_command("serve", "--run", str(run), "--port", "0"), run / "serve.log"


def answers(run: Path) -> bool:
    record = run / "serving.json"
    return record.exists() and json.loads(record.read_text())["url"] in (run / "serve.log").read_text()


@pytest.mark.parametrize(("number", "group"), SIGNALS)
def test_signal_ends_the_service_with_all_its_processes(run: Path, number: signal.Signals, group: bool) -> None:
    with marked_command(*serving(run), lambda _: answers(run)) as service:
        assert len(service.processes()) > 8
        assert len(service.ports()) > 5
        ending = service.stop(number, group=group)
        assert ending.clean, (ending, service.log.read_text())
        assert ending.code in exit_codes(number)
    assert not (run / "serving.json").exists()


def test_signal_during_the_start_leaves_no_process(run: Path) -> None:
    def ray_starts(service: MarkedCommand) -> bool:
        return len(service.processes()) > 4

    with marked_command(*serving(run), ray_starts) as service:
        ending = service.stop(signal.SIGTERM, group=True)
        assert ending.clean, (ending, service.log.read_text())


@pytest.mark.parametrize("which", ["supervisor", "program"])
def test_killed_service_leaves_no_process(run: Path, which: str) -> None:
    with marked_command(*serving(run), lambda _: answers(run)) as service:
        (program,) = psutil.Process(service.process.pid).children()
        everything = service.processes()
        (service.process if which == "supervisor" else program).kill()
        _, alive = psutil.wait_procs(everything, timeout=20)
        assert [one.cmdline() for one in alive] == []
        assert service.processes() == []
