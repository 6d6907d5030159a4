"""Child processes that are terminated with their parent.

Each child gets its own process group, which receives SIGINT, then SIGTERM, then SIGKILL. Only processes that were
started by this module are signalled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from reelway.platform.errors import CommandFailedError

TERMINATION_GRACE_S = 20.0
_DEFERRED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def reelway_command(*args: str) -> list[str]:
    """Returns the command line that runs ``reelway`` from this installation."""
    return [sys.executable, "-m", "reelway.platform.cli", *args]


def terminate_process_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupts the process group, waits up to ``TERMINATION_GRACE_S``, then terminates and kills the rest."""
    for number, wait_s in ((signal.SIGINT, TERMINATION_GRACE_S), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and _process_group_alive(process):
            time.sleep(0.05)
        if not _process_group_alive(process):
            break
    process.wait()


def _process_group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap the leader: a zombie would count as alive
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextmanager
def child_process(command: Sequence[str], *, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a child in its own process group and terminates the group when the block is left for any reason.

    Args:
        log: file for the child's output; by default the child inherits this process's output.
    """
    sink: IO[bytes] | None = log.open("wb") if log else None
    process: subprocess.Popen[bytes] | None = None
    try:
        with _deferred_signals():  # a signal between fork and assignment would orphan the child
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True
            )
        yield process
    finally:
        if sink:
            sink.close()
        if process is not None:
            terminate_process_group(process)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defers SIGINT and SIGTERM until the block has ended, then raises the first one that arrived."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda received_number, _: received.append(received_number))
        for number in _DEFERRED_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def run_command(command: Sequence[str]) -> None:
    """Runs a command on this terminal and waits for it.

    Raises:
        CommandFailedError: if the exit code is not 0.
    """
    with child_process(command) as process:
        code = process.wait()
    if code:
        raise CommandFailedError(command, code)
