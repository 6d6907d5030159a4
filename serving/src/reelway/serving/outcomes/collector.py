"""The object that everything is handed to: a queue, one thread that counts, and futures that wait for the disk.

Many requests share one transaction, and nobody's event loop waits for SQLite. Refuses what it cannot take at once
rather than let a queue grow without bound; what it took is either on disk or answered with an error.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ServingError
from reelway.platform.rollout.evidence import ArmStatistics
from reelway.platform.rollout.policy import Slice
from reelway.platform.rollout.series import RECEIVED_OUTCOMES
from reelway.serving.outcomes.exposition import prometheus_text
from reelway.serving.outcomes.exposures import ExposureBatch
from reelway.serving.outcomes.ledger import Ledger
from reelway.serving.outcomes.outcome_store import OutcomeStore
from reelway.serving.outcomes.reported import OutcomeColumns
from reelway.serving.outcomes.viewer_sums import statistics_of

log = logging.getLogger(__name__)

MAX_WAITING: Final = 500_000
"""Rows in the queue beyond which nothing more is taken: some seconds of work."""
MOST_PER_COMMIT: Final = 50_000
CLEAN_EVERY_S: Final = 60.0
CLEAN_ROWS: Final = 5_000


@dataclass(slots=True)
class _Job:
    """One caller's part of a transaction; exactly one of the first three is given."""

    exposures: ExposureBatch | None = None
    outcomes: OutcomeColumns | None = None
    retire: str = ""
    done: Future[dict[str, int]] = field(default_factory=Future)

    @property
    def rows(self) -> int:
        if self.exposures is not None:
            return len(self.exposures.arm)
        return len(self.outcomes) if self.outcomes is not None else 1


class OutcomeCollector:
    """Counts what rollouts showed and what viewers then did; see the package's docstring for the rules.

    Futures are ``concurrent.futures.Future``: ``.result()`` in a thread, ``await asyncio.wrap_future(...)`` in a loop.
    They end when the transaction is on disk, or with a ``StorageError``: then nothing of it was counted.

    Args:
        path: the SQLite file; made when absent. One process at a time holds it.
        clock: Unix seconds; by it an outcome is late.
        keep_rollouts: the newest ones stay in memory and in the metrics.
        commit_every_s: shortest time between two commits; the first after a rest is at once.
        wait_s: for another process to let go of the file.

    Raises:
        StorageError: the file cannot be opened, is held by another process, or is of another version.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        keep_rollouts: int = 4,
        commit_every_s: float = 0.05,
        wait_s: float = 30.0,
    ) -> None:
        self._store = OutcomeStore(path, wait_s=wait_s)
        self._ledger = Ledger(self._store, clock=clock, keep_rollouts=keep_rollouts)
        self._commit_every_s = commit_every_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # of the two below
        self._waiting = 0
        self._closed = False
        self._refused = 0
        self._thread = threading.Thread(target=self._run, name="outcomes", daemon=True)
        self._thread.start()

    def expose(self, batch: ExposureBatch) -> Future[dict[str, int]]:
        """Count what a router has shown, once per batch number.

        Raises:
            ServingError: too much waits to be counted, or the collector is closed. Nothing of it was taken.
        """
        return self._take(_Job(exposures=batch))

    def record(self, outcomes: OutcomeColumns) -> Future[dict[str, int]]:
        """Count outcomes; the future's answer is how many met each of ``series.RECEIVED_OUTCOMES``.

        Raises:
            ServingError: as ``expose``.
        """
        return self._take(_Job(outcomes=outcomes))

    def retire(self, rollout_id: str) -> Future[dict[str, int]]:
        """End a rollout for good: its sums stay as they are, and what still arrives for it is ``retired``."""
        return self._take(_Job(retire=rollout_id))

    def count_refused(self, outcomes: int) -> None:
        """Note outcomes that were refused by their token or value; since the start of the process."""
        with self._gate:
            self._refused += outcomes

    def metrics_text(self) -> bytes:
        """``series.EXPOSURE``, ``STATISTIC`` and ``RECEIVED`` in Prometheus' text format; only what is on disk."""
        return prometheus_text(self._ledger.snapshot, self._refused)

    def statistics(self, rollout_id: str) -> dict[tuple[Arm, Slice], dict[str, ArmStatistics]]:
        """What is on disk of a rollout, by metric. Of an arm that changed its release, the first one's."""
        found: dict[tuple[Arm, Slice], dict[str, ArmStatistics]] = {}
        for arm, sums_SK in self._ledger.snapshot.sums.items():
            if arm.rollout == rollout_id:
                for part, metrics in statistics_of(sums_SK).items():
                    found.setdefault((arm.arm, part), metrics)
        return found

    def close(self) -> None:
        """Take nothing more, finish what was taken, let go of the file. A second call does nothing."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _take(self, job: _Job) -> Future[dict[str, int]]:
        with self._gate:
            if self._closed:
                raise ServingError("the outcome collector is closed; send it again in a moment")
            if self._waiting and self._waiting + job.rows > MAX_WAITING:
                raise ServingError(f"{self._waiting} rows wait to be counted, at most {MAX_WAITING} may; send it again")
            self._waiting += job.rows
            job.done.set_running_or_notify_cancel()  # it will be counted, whether or not its caller goes away
            self._jobs.put(job)
        return job.done

    def _run(self) -> None:
        next_commit, next_clean, going = 0.0, 0.0, True
        try:
            while going:
                jobs, going = self._gather(next_commit)
                if jobs:
                    self._count(jobs)
                    next_commit = time.monotonic() + self._commit_every_s
                if going and time.monotonic() >= next_clean:
                    left = self._clean()
                    next_clean = time.monotonic() + (1.0 if left else CLEAN_EVERY_S)
        finally:
            self._store.close()

    def _gather(self, not_before: float) -> tuple[list[_Job], bool]:
        """The next jobs for one transaction, and whether there will be more: waits for the first and for its time."""
        try:
            job = self._jobs.get(timeout=1.0)
        except queue.Empty:
            return [], True
        jobs, rows = [], 0
        while job is not None:
            jobs.append(job)
            rows += job.rows
            if rows >= MOST_PER_COMMIT or job.retire:  # what was handed in before it is counted before it
                return jobs, True
            try:
                job = self._jobs.get(timeout=max(not_before - time.monotonic(), 0.0))
            except queue.Empty:
                return jobs, True
        return jobs, False

    def _count(self, jobs: list[_Job]) -> None:
        outcomes = [job for job in jobs if job.outcomes is not None]
        try:
            fates = self._ledger.apply(
                [job.exposures for job in jobs if job.exposures is not None],
                [job.outcomes for job in outcomes if job.outcomes is not None],
                jobs[-1].retire,
            )
        except Exception as error:  # every caller must hear of it, and the next batch may go well again
            log.exception("%d batches of exposures and outcomes were not counted", len(jobs))
            for job in jobs:
                job.done.set_exception(error)
            return
        finally:
            with self._gate:
                self._waiting -= sum(job.rows for job in jobs)
        for job, fate_N in zip(outcomes, fates, strict=True):
            counts = np.bincount(fate_N, minlength=len(RECEIVED_OUTCOMES)).tolist()
            job.done.set_result(dict(zip(RECEIVED_OUTCOMES, counts, strict=True)))
        for job in jobs:
            if job.outcomes is None:
                job.done.set_result({})

    def _clean(self) -> int:
        try:
            return self._ledger.clean(CLEAN_ROWS)
        except Exception:  # nothing depends on it but the size of the file
            log.exception("old outcomes could not be removed, which is tried again")
            return 0
