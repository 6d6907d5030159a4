"""Child processes are terminated by group, and the demo locks its run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from reelway.platform.cli.demo.demo_command import DataChoice, DemoOptions, exclusive_run_lock, offline_steps
from reelway.platform.cli.processes import ChildProcesses, child_process, run_command, terminate_process_group
from reelway.platform.errors import CommandFailedError, ConfigError
from reelway.platform.run_directory import RunDirectory

DEADLINE_S = 20.0

WITH_STUBBORN_GRANDCHILD = """
import pathlib, signal, subprocess, sys, time
ignore = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; "
stubborn = ignore + "print('up', flush=True); time.sleep(600)"
own = sys.argv[2] == "its own session"
grandchild = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=own)
[signal.signal(number, signal.SIG_IGN) for number in (2, 15)]
grandchild.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(str(grandchild.pid))
time.sleep(600)
"""


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written within {DEADLINE_S:g} s")


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("session", ["its group", "its own session"])
def test_grandchild_that_ignores_signals_is_killed(tmp_path: Path, session: str) -> None:
    note = tmp_path / "pid"
    command = [sys.executable, "-c", WITH_STUBBORN_GRANDCHILD, str(note), session]
    with child_process(command, limit_s=0.5) as process:
        grandchild = wait_for(note)
    assert process.returncode is not None
    deadline = time.monotonic() + DEADLINE_S
    while not is_gone(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_children_are_terminated_together(tmp_path: Path) -> None:
    """Three children that take half a second each end within less than the sum."""
    slow = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(0)))\n"
        "pathlib.Path(sys.argv[1]).write_text('1')\n"
        "time.sleep(600)\n"
    )
    with ChildProcesses() as children:
        processes = [children.start([sys.executable, "-c", slow, str(tmp_path / str(number))]) for number in range(3)]
        for number in range(3):
            wait_for(tmp_path / str(number))
        began = time.monotonic()
    assert time.monotonic() - began < 1.4
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_children_that_are_left_running_survive_the_block() -> None:
    with ChildProcesses() as children:
        process = children.start([sys.executable, "-c", "import time; time.sleep(600)"])
        children.leave_running()
    assert process.poll() is None
    terminate_process_group(process)


def test_child_output_is_written_to_its_log(tmp_path: Path) -> None:
    with child_process([sys.executable, "-c", "print('hello')"], log=tmp_path / "log") as process:
        process.wait(DEADLINE_S)
    assert (tmp_path / "log").read_text() == "hello\n"


@pytest.mark.parametrize(("code", "expected"), [(6, 6), (255, 1)])
def test_failed_command_raises_with_its_exit_code(code: int, expected: int) -> None:
    with pytest.raises(CommandFailedError, match=f"exit code {code}") as failed:
        run_command([sys.executable, "-c", f"raise SystemExit({code})"])
    assert failed.value.exit_code == expected


def test_run_directory_lock_excludes_a_second_demo(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with (
        exclusive_run_lock(run),
        pytest.raises(ConfigError, match=r"run: another demo is running.*--run"),
        exclusive_run_lock(run),
    ):
        raise AssertionError("two demos hold the lock")
    with exclusive_run_lock(run):
        pass


def test_signal_during_child_start_terminates_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("reelway.platform.cli.processes.subprocess.Popen", Interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), child_process([sys.executable, "-c", "import time; time.sleep(600)"]):
        raise AssertionError("the signal was lost")
    assert is_gone(started[0].pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_demo_terminates_the_current_step(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "reelway.platform.cli", "demo", "--run", str(tmp_path / "run")]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while len(step := psutil.Process(demo.pid).children(recursive=True)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(step) >= 2, "the demo started no step"
        os.kill(demo.pid, number)
        assert demo.wait(60) in (130, 143)
        assert all(is_gone(child.pid) for child in step)
        assert not (tmp_path / "run" / "dataset").exists()
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)


def test_demo_steps_receive_the_demo_options(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    films = DemoOptions(run, DataChoice.ML_100K, Path("films"), workers=3, gpus=1, seed=7, keep=False)
    commands = [command for _, command in offline_steps(films)]
    assert commands[0][:3] == ["import", "ml-100k", "films"]
    assert commands[2] == [
        "train", "--run", str(tmp_path), "--seed", "7", "--workers", "3", "--gpus", "1", "--preset", "ml-100k",
    ]  # fmt: skip
    assert [command[0] for command in commands] == ["import", "features", "train", "evaluate", "release", "release"]


def test_run_directory_is_independent_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(Path("runs/demo"))
    monkeypatch.chdir("/")
    assert run.models == tmp_path / "runs" / "demo" / "models"
