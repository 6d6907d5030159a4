"""Child processes that never outlive their parent: each in its own group, ended by group, politely and then not.

Refuses to find processes by name: only what was started here is ever signalled.
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

POLITE_S = 20.0
_HELD_BACK = (signal.SIGINT, signal.SIGTERM)


def reelway_command(*words: str) -> list[str]:
    """The command line of this very installation's ``reelway``."""
    return [sys.executable, "-m", "reelway.platform.cli", *words]


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process's whole group, wait ``POLITE_S``, then kill what is left of it."""
    for number, wait_s in ((signal.SIGINT, POLITE_S), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and _group_lives(process):
            time.sleep(0.05)
        if not _group_lives(process):
            break
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap, so that a zombie leader doesn't count as alive
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextmanager
def child(command: Sequence[str], *, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child in its own process group, ended when the block is left, however it is left.

    Args:
        log: where its output goes; this process's own output when absent.
    """
    sink: IO[bytes] | None = log.open("wb") if log else None
    process: subprocess.Popen[bytes] | None = None
    try:
        with _signals_later():  # between a child's start and its name being known, a signal would leave it behind
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True
            )
        yield process
    finally:
        if sink:
            sink.close()
        if process is not None:
            end_group(process)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the block has ended, then let the first of them act as it would have."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread only
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda seen, _: came.append(seen)) for number in _HELD_BACK}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def run_to_end(command: Sequence[str]) -> None:
    """Run a command to its end, on this terminal.

    Raises:
        CommandFailedError: it ended with another code than 0.
    """
    with child(command) as process:
        code = process.wait()
    if code:
        raise CommandFailedError(command, code)
