"""Why: the controller of one run directory as a process: its parts put together, one per run, ended cleanly.

It decides nothing and knows the parts by their factories only.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reelway.platform.durable import write_json
from reelway.platform.errors import RolloutError, StorageError
from reelway.platform.rollout.control.alert_book import AlertBook
from reelway.platform.rollout.control.bearer_token import bearer_token
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import serving, webhook_application
from reelway.platform.rollout.sources import alert_source, evidence_source
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.runs import RunDirectory

log = logging.getLogger(__name__)

WEBHOOK_TOKEN: Final = "webhook.token"


@dataclass(frozen=True)
class ControllerSettings:
    """What ``reelway rollout controller`` is started with."""

    run: Path
    """Run directory."""
    host: str = "127.0.0.1"
    """Address of the alert webhook."""
    port: int = 0
    """Its port; 0 chooses a free one, which ``rollout/controller.json`` then says."""
    interval_s: float = 1.0
    """Seconds between two looks; commands and alerts do not wait for them."""
    prometheus_url: str | None = None
    """Asked for evidence; None scrapes the service directly."""
    alertmanager_url: str | None = None
    """Polled for alerts besides the webhook; None polls nothing."""
    poll_s: float = 5.0
    """Seconds between two polls."""


def run_controller(settings: ControllerSettings, stop: threading.Event | None = None) -> None:
    """Look after a run's rollouts until SIGTERM, Ctrl-C or ``stop``. What is under way is finished first.

    Writes ``rollout/controller.json`` ({url, pid}) once it listens, and removes it at the end. The webhook's token is
    in ``keys/webhook.token``, made when there is none.

    Raises:
        RolloutError: the run has a controller already.
        ConfigError: the address cannot be listened at.
        StorageError: the run directory cannot be written.
        MalformedFileError: ``rollout/state.db`` is not a store of rollouts.
    """
    run = RunDirectory(settings.run)
    record = run.path / "rollout" / "controller.json"
    stop, wake = stop or threading.Event(), threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_only_one(run, record))
        stack.enter_context(stopped_by_signals(stop.set))
        token = bearer_token(run.keys / WEBHOOK_TOKEN)
        store = stack.enter_context(closing(SqliteRolloutStore(run.path / "rollout" / "state.db")))
        backend = stack.enter_context(closing(ServeRestBackend(run)))
        book, metrics = AlertBook(store), ControllerMetrics()
        controller = Controller(
            store,
            backend,
            evidence_source(run, settings.prometheus_url),
            book,
            alert_source=alert_source(settings.alertmanager_url) if settings.alertmanager_url else None,
            poll_s=settings.poll_s,
            metrics=metrics,
        )
        application = webhook_application(book, wake.set, token, metrics)
        url = stack.enter_context(serving(application, settings.host, settings.port))
        write_json(record, {"url": url, "pid": os.getpid()})
        stack.callback(record.unlink, missing_ok=True)
        log.info("controller of %s: alerts at %s", run.path, url)
        controller.run(stop, wake, settings.interval_s)
    log.info("controller of %s: ended", run.path)


@contextmanager
def _only_one(run: RunDirectory, record: Path) -> Iterator[None]:
    """A lock that the system lets go of when the process ends, however it ends."""
    path = run.path / "rollout" / "controller.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RolloutError(
                f"run {run.path} has a controller already{_who(record)}; stop that one first, or leave it to its work"
            ) from None
        yield


def _who(record: Path) -> str:
    try:
        known = json.loads(record.read_text())
        return f" (process {known['pid']} at {known['url']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # it is just starting


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the loop between two looks instead of unwinding it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
