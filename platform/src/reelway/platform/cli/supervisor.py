"""Supervisor of a command whose libraries start processes (Ray with its workers and HAProxy).

``supervise`` forks. The command continues in the child, in a session of its own. The parent, which the user sees:

- passes the first stop signal on to the child alone, so that the child ends its processes in order;
- kills whatever is left of the process tree when the child has ended, at the latest after a limit;
- exits with the child's code.

On Linux the parent is the subreaper of its tree: the kernel makes orphans its children, so that none is lost. If the
parent itself is killed, the child receives SIGTERM.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import sys
import time
from typing import Final, NoReturn

import psutil

from reelway.platform.cli.processes import kill_processes
from reelway.platform.stop_signals import STOP_SIGNALS, handled_signals

ORPHAN_GRACE_S: Final = 1.0
"""Seconds in which processes that have lost their parent may end on their own, before they are killed."""
KILL_LIMIT_S: Final = 2.0
_SET_PARENT_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG
_SET_CHILD_SUBREAPER: Final = 36  # PR_SET_CHILD_SUBREAPER
_POLL_S: Final = 0.02


class _Supervision:
    enabled = False
    """Whether ``supervise`` forks: in the program ``reelway``, not in a process that calls a command as a function."""
    supervisor: int | None = None
    """Process id of this process's supervisor."""


_LEAVE_RUNNING: Final = signal.SIGUSR1
"""From the child to its supervisor: kill nothing when the child has ended."""


def enable_supervision() -> None:
    """Lets ``supervise`` fork. Called by the program ``reelway`` before it has threads."""
    _Supervision.enabled = True


def command_pid() -> int:
    """Returns the process id that a user signals to stop this command: its supervisor's, or its own."""
    return _Supervision.supervisor or os.getpid()


def leave_processes_running() -> None:
    """Lets the processes of this command run on when it ends now with success."""
    if _Supervision.supervisor is not None:
        os.kill(_Supervision.supervisor, _LEAVE_RUNNING)


def supervise(limit_s: float) -> None:
    """Continues in a supervised child process; see the module. Must be called before the process has threads.

    Args:
        limit_s: seconds from a stop signal until the whole process tree is killed.
    """
    if not _Supervision.enabled:
        return
    supervisor = os.getpid()
    _prctl(_SET_CHILD_SUBREAPER, 1)
    sys.stdout.flush()
    sys.stderr.flush()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGCHLD, _LEAVE_RUNNING})
    child = os.fork()
    if child:
        _exit_with_child(child, mask, limit_s)
    os.setsid()
    _prctl(_SET_CHILD_SUBREAPER, 0)
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != supervisor:  # it was killed before this process asked for its signal
        os._exit(1)
    _Supervision.enabled, _Supervision.supervisor = False, supervisor
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exit_with_child(child: int, mask: set[int], limit_s: float) -> NoReturn:
    """Waits for the child, ends its process tree and exits."""
    received: list[int] = []
    stops: list[int] = []
    wakeup, deadline, status = _wakeup_pipe(received), math.inf, None
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    while status is None and time.monotonic() < deadline:
        select.select([wakeup], [], [], None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        _drain(wakeup)
        status = _reap(child)
        stops = [number for number in received if number != _LEAVE_RUNNING]
        if stops and deadline == math.inf and status is None:
            deadline = time.monotonic() + limit_s
            os.kill(child, stops[0])
    if status is None:
        print(f"not stopped within {limit_s:g} s: killing the remaining processes", file=sys.stderr, flush=True)
        code = 128 + stops[0]
    else:
        code = os.waitstatus_to_exitcode(status)
        if code == 0 and _LEAVE_RUNNING in received:
            os._exit(0)
        _await_orphans(ORPHAN_GRACE_S)
    _kill_orphans(KILL_LIMIT_S)
    os._exit(code if code >= 0 else 128 - code)


def _wakeup_pipe(received: list[int]) -> int:
    """Returns a file descriptor that becomes readable at each signal; stop signals are appended to ``received``."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (*handled_signals(), _LEAVE_RUNNING):
        signal.signal(number, lambda number, _: received.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return reading


def _drain(reading: int) -> None:
    try:
        while os.read(reading, 512):
            pass
    except BlockingIOError:
        return


def _reap(child: int) -> int | None:
    """Reaps all processes that have ended, also adopted ones. Returns the child's status if it is among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == child:
            return status
        if pid == 0:
            return None


def _remaining() -> list[psutil.Process]:
    _reap(0)
    return psutil.Process().children(recursive=True)


def _await_orphans(wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while _remaining() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _kill_orphans(limit_s: float) -> None:
    """Kills the rest of the process tree until nothing is left: a process may fork while it is being killed."""
    deadline = time.monotonic() + limit_s
    while (remaining := _remaining()) and time.monotonic() < deadline:
        kill_processes(remaining)
        time.sleep(_POLL_S)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
