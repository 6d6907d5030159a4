"""Runs a command, sends a stop signal to it or to its process group, and finds whatever it leaves behind.

Each command gets a mark in its environment, which all its descendants inherit. Processes are found by the mark, never
by name, also if they have left their parent, their group and their session.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

STOP_BAR_S = 15.0
MARK = "REELWAY_TEST_MARK"
SIGNALS = [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGHUP, True)]
"""Stop signals, and whether each is sent to the process group."""
_HUNG_S = 90.0


def exit_codes(number: signal.Signals) -> set[int]:
    """Returns the exit codes of a command that a signal interrupted."""
    return {130 if number == signal.SIGINT else 128 + number}


@dataclass(frozen=True)
class Ending:
    """How a command ended after a signal."""

    seconds: float
    code: int | None
    processes_left: list[str]
    """Command lines of the processes of the command that were alive when it had ended."""
    ports_left: list[int]
    """Ports on which the command listened and still listens; other processes may listen on them by now."""

    @property
    def clean(self) -> bool:
        return self.seconds <= STOP_BAR_S and not self.processes_left and not self.ports_left


class MarkedCommand:
    """A running command, leader of its own process group, as a shell starts it."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, log: Path) -> None:
        self.process, self.log = process, log
        self._mark = f"{MARK}={mark}".encode()

    def processes(self) -> list[psutil.Process]:
        """Returns the command's processes that are alive."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if self._mark in environment and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ports(self) -> set[int]:
        """Returns the ports on which the command's processes listen."""
        found: set[int] = set()
        for process in self.processes():
            with suppress(psutil.Error):
                connections = process.connections("tcp")
                found |= {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
        return found

    def stop(self, number: signal.Signals, *, group: bool) -> Ending:
        """Sends the signal to the process or to its group and waits for the end."""
        ports, began = self.ports(), time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_HUNG_S)
        seconds = time.monotonic() - began
        left = self.processes()
        listening = _listeners()
        ports_left = sorted(port for port in ports if listening.get(port, 0) in {None, *(one.pid for one in left)})
        return Ending(seconds, self.process.poll(), [" ".join(_command_line(one))[:120] for one in left], ports_left)

    def kill_rest(self) -> None:
        """Kills all processes of the command."""
        deadline = time.monotonic() + 10
        while (alive := self.processes()) and time.monotonic() < deadline:
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()
            time.sleep(0.05)
        self.process.wait(10)


@contextmanager
def marked_command(
    command: Sequence[str], log: Path, ready: Callable[[MarkedCommand], bool], *, timeout_s: float = 150.0
) -> Iterator[MarkedCommand]:
    """Runs a command until it is ready, and kills what is left of it when the block is left.

    Raises:
        AssertionError: if the command ends or the timeout passes before it is ready; contains its output.
    """
    mark = uuid.uuid4().hex
    with log.open("wb") as output, _handled_hangups():
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, MARK: mark},
        )  # fmt: skip
    running = MarkedCommand(process, mark, log)
    try:
        deadline = time.monotonic() + timeout_s
        while not ready(running):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        yield running
    finally:
        running.kill_rest()


@contextmanager
def _handled_hangups() -> Iterator[None]:
    """Lets a child that is started in the block receive SIGHUP, also if this process runs under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def printed(text: str) -> Callable[[MarkedCommand], bool]:
    """Returns a condition: the command has printed the text."""
    return lambda command: text in command.log.read_text(errors="replace")


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [process.name()]
    except psutil.Error:
        return [f"process {process.pid}"]


def _listeners() -> dict[int, int | None]:
    """Returns port -> process that listens on it; None if the kernel names none."""
    found = psutil.net_connections("tcp")
    return {one.laddr.port: one.pid for one in found if one.status == psutil.CONN_LISTEN}
