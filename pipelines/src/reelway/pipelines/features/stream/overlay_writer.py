"""The overlay writer: the one process that embeds uploads for every open release.

::

    topic catalogue ─► VersionGuard ─► ReleaseOverlay of each open release ─► overlay/<release>/ ─► every replica
    topic takedowns ─► VersionGuard

A release is open while replicas request it (``OverlayRequests``). Each upload is embedded once per open release. A
release that opens later reads the topic from its beginning. If a release fails, the others go on, and it is opened
again after ``RETRY_DELAY_S``.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server

from reelway.pipelines.features.stream.decoded_uploads import DecodedUploads
from reelway.pipelines.features.stream.list_writer import ListWriter
from reelway.pipelines.features.stream.release_overlay import REFUSALS, OverlayStep, ReleaseOverlay
from reelway.pipelines.features.stream.uploads import VideoRows
from reelway.platform.contracts.ids import ReleaseId, short_id
from reelway.platform.errors import ConfigError, ReelwayError, StorageError
from reelway.platform.eventlog.catalogue_events import decode_status_changes
from reelway.platform.eventlog.catalogue_log import READ_LIMIT, VersionGuard
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.eventlog.upload_overlay import OverlayRequests
from reelway.platform.listen_address import all_interfaces
from reelway.platform.release.cache import ReleaseCache
from reelway.platform.release.signing import load_public_keys
from reelway.platform.release.store import ReleaseStore
from reelway.platform.supervised_thread import export_failures
from reelway.platform.telemetry import counter, gauge

log = logging.getLogger(__name__)

IDLE_DELAY_S: Final = 0.1
"""Delay between two steps when the topics had nothing new."""
REQUESTS_INTERVAL_S: Final = 5.0
"""How often the requested releases are listed."""
RETRY_DELAY_S: Final = 5.0
"""Delay until a release that failed is opened again."""


@dataclass(frozen=True)
class OverlayOptions:
    """Inputs and outputs of the overlay writer."""

    events: str  # event log
    overlay: str  # folder or fsspec URL
    release_store: str
    release_cache: Path
    public_keys: Path
    lists_state: Path  # state of the list task, on a disk of this process
    metrics_port: int | None = None


class OverlayWriterMetrics:
    """Exports the metrics ``reelway_uploads_*``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.age = gauge(
            "reelway_uploads_age_seconds",
            "Time since the catalogue was last read to its end with every requested release written.", [], registry,
        )  # fmt: skip
        self.rows = gauge("reelway_uploads_overlay_rows", "Rows of a release's overlay.", ["release"], registry)
        self.embedded = counter(
            "reelway_uploads_embedded_total", "Uploads and updates that became rows.", ["release"], registry
        )
        self.refused = counter(
            "reelway_uploads_refused_total", "Uploads that are not in the overlay.", ["release", "kind"], registry
        )
        self.repaired = counter(
            "reelway_uploads_repaired_total", "Records appended again because an older version came after them.", [],
            registry,
        )  # fmt: skip
        self.unrepaired = counter(
            "reelway_uploads_unrepaired_total", "Newest versions that were to be appended again and are gone.", [],
            registry,
        )  # fmt: skip
        self.faults = counter("reelway_uploads_faults_total", "Steps that failed.", [], registry)

    def record(self, release: str, step: OverlayStep, rows: int) -> None:
        """Adds the result of one step of a release."""
        self.rows.labels(short_id(release)).set(rows)
        self.embedded.labels(short_id(release)).inc(step.embedded)
        for kind in REFUSALS:
            self.refused.labels(short_id(release), kind).inc(step.refused.get(kind, 0))


class OverlayWriter:
    """Writes the overlays of all open releases; see the module docstring.

    Raises:
        ConfigError: if the address of the event log is invalid.
        StorageError: if a topic cannot be opened.
    """

    def __init__(
        self, options: OverlayOptions, metrics: OverlayWriterMetrics, clock: Callable[[], float] = time.time
    ) -> None:
        self._options = options
        self._metrics = metrics
        self._clock = clock
        self._store = ReleaseStore(options.release_store)
        self._requests = OverlayRequests(options.overlay)
        self._stack = ExitStack()
        catalogue, takedowns = (
            self._stack.enter_context(closing(open_topic(options.events, topic)))
            for topic in (Topic.CATALOGUE, Topic.TAKEDOWNS)
        )
        self._decode = DecodedUploads()
        self._uploads = VersionGuard(catalogue, self._decode)
        self._guards = (self._uploads, VersionGuard(takedowns, decode_status_changes))
        self._served: set[str] = set()  # releases to write, by the last listing
        self._overlays: dict[str, ReleaseOverlay] = {}
        self._retry_at: dict[str, float] = {}
        self._next_listing = float("-inf")
        self._is_listed = False
        self._current_at = clock()
        metrics.age.set_function(lambda: max(self._clock() - self._current_at, 0.0))

    def step(self) -> int:
        """Takes in what is new and returns the number of records that were read."""
        read = 0
        is_current = True
        for guard in self._guards:
            try:
                result = guard.step()
            except StorageError as error:
                self._fail("catalogue", error)
                return 0
            read += result.read
            is_current &= guard.is_at_end and result.read < READ_LIMIT
            self._metrics.repaired.inc(result.appended)
            self._metrics.unrepaired.inc(result.lost)
        is_current &= self._open_and_close()
        if self._uploads.is_at_end:  # before, the newest version of a video is not known
            for release, overlay in list(self._overlays.items()):
                read += self._step_release(release, overlay)
        if is_current and self._served <= set(self._overlays):
            self._current_at = self._clock()
        return read

    def close(self) -> None:
        """Closes the logs."""
        for overlay in self._overlays.values():
            overlay.close()
        self._stack.close()

    def _step_release(self, release: str, overlay: ReleaseOverlay) -> int:
        try:
            done = overlay.step()
        except ReelwayError as error:
            self._fail(release, error)
            overlay.close()
            del self._overlays[release]
            return 0
        self._metrics.record(release, done, overlay.count)
        return done.read

    def _open_and_close(self) -> bool:
        """Opens the releases that are requested and closes those that are not any more.

        Returns:
            Whether the requests could be listed when they were last due.
        """
        now = self._clock()
        if now >= self._next_listing:
            self._next_listing = now + REQUESTS_INTERVAL_S
            self._is_listed = False
            try:
                self._served = set(self._requests.served(now))
                self._is_listed = True
            except StorageError as error:
                self._fail("overlay", error)
        for release in set(self._overlays) - self._served:
            self._overlays.pop(release).close()
        for release in self._served - set(self._overlays):
            if now >= self._retry_at.get(release, now):
                self._open(release)
        return self._is_listed

    def _open(self, release: str) -> None:
        options, cache = self._options, ReleaseCache(self._options.release_cache)
        try:
            cache.prune()
            use = cache.hold(ReleaseId(release))
            keys = load_public_keys(options.public_keys)
            folder = self._store.fetch(ReleaseId(release), options.release_cache, public_keys=keys)
            catalogue = open_topic(options.events, Topic.CATALOGUE)
            self._overlays[release] = ReleaseOverlay(
                VideoRows(folder), catalogue, options.overlay, self._uploads.is_newest, self._decode
            )
            self._overlays[release].release_use = use
            log.info("release %s: overlay has %d rows", short_id(release), self._overlays[release].count)
        except ReelwayError as error:
            self._fail(release, error)

    def _fail(self, subject: str, error: ReelwayError) -> None:
        self._metrics.faults.inc()
        now = self._clock()
        if now >= self._retry_at.get(subject, now):  # one line per attempt, not per step
            self._retry_at[subject] = now + RETRY_DELAY_S
            log.error("overlay of %s: not updated: %s", short_id(subject), error)


def run_overlay_writer(options: OverlayOptions, stop: threading.Event) -> None:
    """Writes overlays until ``stop`` is set.

    Raises:
        ConfigError: if another process writes the overlay, or a setting is invalid.
        StorageError: if the event log cannot be opened.
    """
    registry = CollectorRegistry()
    export_failures(registry)
    metrics = OverlayWriterMetrics(registry)
    with (
        only_writer(options.overlay),
        closing(OverlayWriter(options, metrics)) as writer,
        closing(ListWriter(options.events, options.overlay, options.lists_state, registry)) as lists,
    ):
        poller = ListPoller(lists, metrics)
        port = options.metrics_port
        server = start_http_server(port, all_interfaces(), registry=registry) if port else None
        try:
            while not stop.is_set():
                changed = writer.step()
                if not (poller.poll() or changed):
                    stop.wait(IDLE_DELAY_S)
        finally:
            if server:
                server[0].shutdown()
                server[0].server_close()


class ListPoller:
    """Polls the list task. After an error it waits ``RETRY_DELAY_S``, so that a fault is not repeated at every step."""

    def __init__(
        self, lists: ListWriter, metrics: OverlayWriterMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lists = lists
        self._metrics = metrics
        self._clock = clock
        self._retry_at = float("-inf")

    def poll(self) -> int:
        """Returns the number of new events; 0 after an error."""
        if self._clock() < self._retry_at:
            return 0
        try:
            return self._lists.poll()
        except ReelwayError as error:
            self._metrics.faults.inc()
            self._retry_at = self._clock() + RETRY_DELAY_S
            log.error("lists: not updated, trying again in %g s: %s", RETRY_DELAY_S, error)
            return 0


@contextmanager
def only_writer(overlay: str) -> Iterator[None]:
    """Locks an overlay on a local disk: row numbers have one writer. Elsewhere the deployment has one replica.

    Raises:
        ConfigError: if another process writes the overlay.
    """
    if "://" in overlay:
        yield
        return
    folder = Path(overlay)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".writer.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"overlay {overlay}: another process writes it; stop that process first") from None
        yield
