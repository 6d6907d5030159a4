"""Stop signals: every command ends within ``STOP_LIMIT_S`` of SIGTERM, SIGINT or SIGHUP.

- ``exit_on_stop_signals`` is called once, when the program starts. From then on a signal unwinds the stack.
- ``stopped_by_signals`` is for loops: a signal calls a function, and the loop ends between two iterations.
- A program that has not ended at the limit prints the stack of each thread and exits with code 1.

SIGHUP stays ignored if it was ignored when the program started (``nohup``). SIGINT does not: a shell ignores it for
background processes.
"""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_LIMIT_S: Final = 14.0
"""Seconds from a stop signal to the forced end of a process."""


class _Program:
    limited = False
    """Whether this process is a program of its own, which ends at the limit. False in a test or a library."""


def exit_on_stop_signals() -> None:
    """Makes stop signals unwind the stack, so that child processes and files are cleaned up.

    SIGINT raises ``KeyboardInterrupt``, the others ``SystemExit`` with code 128 + number.
    """
    _Program.limited = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in handled_signals():
        if number != signal.SIGINT:
            signal.signal(number, _raise_exit)


def handled_signals() -> tuple[signal.Signals, ...]:
    """Returns the stop signals, without SIGHUP if the process ignores it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignores_hangup)


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls ``stop`` on a stop signal while the block runs. In another thread than the main one it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        start_stop_limit()
        stop()

    before = {number: signal.signal(number, handle) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def call_on_stop_signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    """Calls ``stop`` in the event loop on each stop signal, for as long as the loop runs."""

    def handle() -> None:
        start_stop_limit()
        stop()

    for number in handled_signals():
        loop.add_signal_handler(number, handle)


@contextmanager
def preserved_stop_signals() -> Iterator[None]:
    """Restores the handlers when the block is left. A library such as Ray installs handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignored_stop_signals() -> Iterator[None]:
    """Ignores stop signals while the block runs: a second one during the cleanup must not leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_stop_limit() -> None:
    """Ends the program at the limit from now, also if no Python code can run by then."""
    if _Program.limited:
        faulthandler.dump_traceback_later(STOP_LIMIT_S, exit=True)


def _raise_exit(number: int, _frame: FrameType | None) -> NoReturn:
    start_stop_limit()
    raise SystemExit(128 + number)
