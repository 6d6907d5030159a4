"""Starts and stops the node's processes, identified by pid and start time.

A pid alone may have been reused by another process; together with the start time it is unique. No process is looked up
by name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from layout import NodePaths


@dataclass(frozen=True)
class ProcessRecord:
    """A process that was started here."""

    pid: int
    start_ticks: int  # clock ticks since boot, field 22 of /proc/PID/stat

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.start_ticks


_NICENESS = -10
"""Niceness of the node's processes, so that they respond while pods use every core."""


class ProcessTable:
    """The processes recorded in ``processes.json``."""

    def __init__(self, layout: NodePaths) -> None:
        self._layout = layout

    def running(self, name: str) -> bool:
        """Returns whether the recorded process of that name is alive."""
        started = self._record().get(name)
        return started is not None and started.alive

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts a process in its own session unless it runs. Its output goes to ``logs/<name>.log``."""
        if self.running(name):
            return
        self._layout.logs.mkdir(parents=True, exist_ok=True)
        with (self._layout.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        _raise_priority(process.pid)
        start_ticks = _start_time(process.pid)
        self._write({**self._record(), name: ProcessRecord(process.pid, start_ticks or 0)})

    def stop(self, name: str, *, wait_s: float = 15.0) -> None:
        """Sends SIGTERM, and SIGKILL after ``wait_s`` seconds."""
        record = self._record()
        started = record.pop(name, None)
        if started is not None:
            for number, patience_s in ((signal.SIGTERM, wait_s), (signal.SIGKILL, 5.0)):
                if not started.alive:
                    break
                os.kill(started.pid, number)
                deadline = time.monotonic() + patience_s
                while started.alive and time.monotonic() < deadline:
                    time.sleep(0.05)
        self._write(record)

    def names(self) -> list[str]:
        """Returns the names in start order."""
        return list(self._record())

    def log_tail(self, name: str, lines: int = 15) -> str:
        """Returns the last lines of the process's log."""
        path = self._layout.logs / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"

    def _record(self) -> dict[str, ProcessRecord]:
        path = self._layout.processes
        if not path.exists():
            return {}
        return {name: ProcessRecord(**values) for name, values in json.loads(path.read_text()).items()}

    def _write(self, record: Mapping[str, ProcessRecord]) -> None:
        path: Path = self._layout.processes
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({name: asdict(started) for name, started in record.items()}, indent=1))
        temporary.replace(path)


def _raise_priority(pid: int) -> None:
    """Raises the priority of the process's session, if the kernel schedules by session (autogroup).

    The priority belongs to the session, because children of containerd are pods' processes and must not inherit it.
    """
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text(str(_NICENESS))


def _start_time(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
