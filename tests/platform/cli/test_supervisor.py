"""A supervised command: signals, exit codes, and processes that have left its group and its session."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from tests.support.process_life import MarkedCommand, exit_codes, marked_command, printed

LIMIT_S = 2.0
COMMAND = """
import os, signal, subprocess, sys, time
from reelway.platform.cli import supervisor
from reelway.platform.stop_signals import exit_on_stop_signals

exit_on_stop_signals()
supervisor.enable_supervision()
supervisor.supervise(float(sys.argv[2]))
deaf = "import signal, time; [signal.signal(number, signal.SIG_IGN) for number in (1, 2, 15)]; print(); time.sleep(600)"
leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True).wait(0.5)"
subprocess.Popen([sys.executable, "-c", leave], stderr=subprocess.DEVNULL).wait()  # its child is an orphan now
mode = sys.argv[1]
print("up", supervisor.command_pid(), flush=True)
if mode == "fails":
    sys.exit(7)
if mode == "keeps":
    supervisor.leave_processes_running()
    sys.exit(0)
try:
    time.sleep(600)
finally:
    print("cleans up", flush=True)
    while mode == "hangs":
        try:
            time.sleep(600)
        except BaseException:
            pass
"""


def supervised(mode: str) -> Sequence[str]:
    return [sys.executable, "-c", COMMAND, mode, str(LIMIT_S)]


def started(tmp_path: Path, mode: str):  # type: ignore[no-untyped-def]
    return marked_command(supervised(mode), tmp_path / "log", printed("up"), timeout_s=30)


def wait_until_gone(command: MarkedCommand) -> None:
    deadline = time.monotonic() + 10
    while alive := command.processes():
        assert time.monotonic() < deadline, [one.cmdline() for one in alive]
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("group", [False, True])
def test_signal_reaches_the_command_once_and_orphans_are_killed(
    tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    with started(tmp_path, "waits") as command:
        assert len(command.processes()) == 3
        assert f"up {command.process.pid}\n" in command.log.read_text()
        ending = command.stop(number, group=group)
        assert ending.processes_left == []
        assert ending.code in exit_codes(number)
        assert command.log.read_text().count("cleans up") == 1


def test_command_that_hangs_is_killed_at_the_limit(tmp_path: Path) -> None:
    with started(tmp_path, "hangs") as command:
        ending = command.stop(signal.SIGTERM, group=True)
        assert LIMIT_S <= ending.seconds < LIMIT_S + 5
        assert ending.processes_left == []
        assert ending.code == 143
        assert "not stopped within 2 s: killing the remaining processes" in command.log.read_text()


@pytest.mark.parametrize("killed", ["supervisor", "command"])
def test_kill_of_either_process_leaves_nothing(tmp_path: Path, killed: str) -> None:
    with started(tmp_path, "waits") as command:
        (child, _) = sorted(psutil.Process(command.process.pid).children(), key=lambda one: one.create_time())
        if killed == "command":
            child.kill()
            assert command.process.wait(10) == 137
            wait_until_gone(command)
        else:
            command.process.kill()
            assert psutil.wait_procs([child], timeout=10)[1] == []
            assert "cleans up" in command.log.read_text()


@pytest.mark.parametrize(("mode", "code", "left"), [("fails", 7, 0), ("keeps", 0, 1)])
def test_command_that_ends_passes_its_code_on(tmp_path: Path, mode: str, code: int, left: int) -> None:
    with marked_command(supervised(mode), tmp_path / "log", lambda _: True) as command:
        assert command.process.wait(20) == code
        assert len(command.processes()) == left
