"""The local controller: runs the ``Controller`` of one run directory as a process.

A lock allows one controller per run directory.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from reelway.platform.atomic_files import write_json
from reelway.platform.errors import RolloutError, StorageError
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.bearer_token import ensure_bearer_token
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.controller_settings import (
    AlertmanagerSettings,
    PrometheusSettings,
    Seconds,
    SettingsGroup,
    WebhookSettings,
)
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import serve_in_thread, webhook_application
from reelway.platform.rollout.sources import evidence_source
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.run_directory import RunDirectory
from reelway.platform.stop_signals import stopped_by_signals

log = logging.getLogger(__name__)

WEBHOOK_TOKEN: Final = "webhook.token"


class ControllerSettings(SettingsGroup):
    """Settings of ``reelway rollout controller``. The groups have the same keys as those of the operator."""

    run: Path
    """Run directory."""
    interval_s: Seconds = 1.0
    """Pause between two reconciles; commands and alerts are handled at once."""
    webhook: WebhookSettings = WebhookSettings()
    prometheus: PrometheusSettings = PrometheusSettings()
    alertmanager: AlertmanagerSettings = AlertmanagerSettings()


def run_controller(settings: ControllerSettings, stop: threading.Event | None = None) -> None:
    """Manages a run's rollouts until SIGTERM, Ctrl-C or ``stop``, and finishes the current reconcile first.

    Writes ``rollout/controller.json`` ({url, pid}) when the webhook listens, and removes it at the end. The webhook's
    token is in ``keys/webhook.token``; the file is created if it does not exist.

    Raises:
        RolloutError: if another controller manages the run.
        ConfigError: if the webhook's address cannot be bound or ``ca_file`` cannot be read.
        StorageError: if the run directory cannot be written.
        MalformedFileError: if ``rollout/state.db`` is not a rollout store.
    """
    run = RunDirectory(settings.run)
    record = run.path / "rollout" / "controller.json"
    stop, wake = stop or threading.Event(), threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_exclusive_lock(run, record))
        stack.enter_context(stopped_by_signals(stop.set))
        token = ensure_bearer_token(run.keys / WEBHOOK_TOKEN)
        store = stack.enter_context(closing(SqliteRolloutStore(run.path / "rollout" / "state.db")))
        backend = stack.enter_context(closing(ServeRestBackend(run)))
        alerts, metrics = AlertRegistry(store, on_change=wake.set), ControllerMetrics()
        controller = Controller(
            store,
            backend,
            evidence_source(run, settings.prometheus.url, access=settings.prometheus.access()),
            alerts,
            alert_source=settings.alertmanager.source(),
            poll_s=settings.alertmanager.poll_interval_s,
            metrics=metrics,
        )
        application = webhook_application(alerts, wake.set, token, metrics)
        webhook = settings.webhook
        url = stack.enter_context(serve_in_thread(application, webhook.host, webhook.port, webhook.certificate()))
        write_json(record, {"url": url, "pid": os.getpid()})
        stack.callback(record.unlink, missing_ok=True)
        log.info("controller of %s: started, webhook at %s", run.path, url)
        controller.run(stop, wake, settings.interval_s)
    log.info("controller of %s: stopped", run.path)


@contextmanager
def _exclusive_lock(run: RunDirectory, record: Path) -> Iterator[None]:
    """Holds a lock that the operating system releases when the process ends."""
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
                f"run {run.path} has a controller already{_holder_description(record)}; stop that controller first"
            ) from None
        yield


def _holder_description(record: Path) -> str:
    try:
        known = json.loads(record.read_text())
        return f" (process {known['pid']} at {known['url']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # the other controller is still starting
