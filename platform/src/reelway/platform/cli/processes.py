"""Child processes that are terminated with their parent.

Each child gets its own session, so that a signal to the parent's process group reaches the parent alone, and the parent
ends its children in order: SIGTERM to the child's group, then SIGKILL to the group and to all descendants. Only
processes that were started by this module, and their descendants, are signalled. ``supervisor`` is for commands whose
children are started by a library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Final, Self

import psutil

from reelway.platform.errors import CommandFailedError
from reelway.platform.stop_signals import STOP_LIMIT_S, STOP_SIGNALS, ignored_stop_signals

KILL_WAIT_S: Final = 5.0
"""Seconds to wait for processes that were killed."""
_POLL_S: Final = 0.05


def reelway_command(*args: str) -> list[str]:
    """Returns the command line that runs ``reelway`` from this installation."""
    return [sys.executable, "-m", "reelway.platform.cli", *args]


def terminate_process_groups(processes: Sequence[subprocess.Popen[bytes]], limit_s: float = STOP_LIMIT_S) -> None:
    """Terminates the process groups at the same time, and after ``limit_s`` kills the rest with its descendants."""
    with ignored_stop_signals():
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        _wait_for_groups(processes, limit_s)
        alive = [process for process in processes if _group_alive(process)]
        descendants = [one for process in alive for one in _descendants(process.pid)]
        for process in alive:
            _signal_group(process, signal.SIGKILL)
        kill_processes(descendants)
        _wait_for_groups(alive, KILL_WAIT_S)
        for process in processes:
            process.wait()


def terminate_process_group(process: subprocess.Popen[bytes]) -> None:
    """Terminates one process group as ``terminate_process_groups`` does."""
    terminate_process_groups([process])


class ChildProcesses:
    """Children in sessions of their own. Leaving the block terminates them together, for whatever reason it is left.

    Args:
        limit_s: seconds from SIGTERM to SIGKILL.
    """

    def __init__(self, limit_s: float = STOP_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], log: Path | None = None) -> subprocess.Popen[bytes]:
        """Starts a child.

        Args:
            log: file for the child's output; by default the child inherits this process's output.
        """
        with _deferred_signals(), ExitStack() as stack:  # a signal after the fork would orphan the child
            sink: IO[bytes] | None = stack.enter_context(log.open("wb")) if log else None
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True
            )
            self._processes.append(process)
        return process

    def interrupt(self) -> None:
        """Sends SIGTERM and does not wait, so that the children stop while this process stops something else."""
        for process in self._processes:
            _signal_group(process, signal.SIGTERM)

    def leave_running(self) -> None:
        """Lets the children run on when the block is left."""
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        terminate_process_groups(self._processes, self._limit_s)


@contextmanager
def child_process(
    command: Sequence[str], *, log: Path | None = None, limit_s: float = STOP_LIMIT_S
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs one child as ``ChildProcesses`` does."""
    with ChildProcesses(limit_s) as children:
        yield children.start(command, log)


def run_command(command: Sequence[str]) -> None:
    """Runs a command on this terminal and waits for it.

    Raises:
        CommandFailedError: if the exit code is not 0.
    """
    with child_process(command) as process:
        code = process.wait()
    if code:
        raise CommandFailedError(command, code)


def kill_processes(processes: Sequence[psutil.Process]) -> None:
    """Kills the processes that are still the recorded ones: psutil compares the start time with the pid."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap the leader: a zombie would count as alive
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _wait_for_groups(processes: Sequence[subprocess.Popen[bytes]], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while any(_group_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defers stop signals until the block has ended, then raises the first one that arrived."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda received_number, _: received.append(received_number))
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
