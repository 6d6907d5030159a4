"""Counts exposures and outcomes in batches, on one thread, and answers when they are on disk.

The package's docstring gives the counting rules.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.evidence import ArmStatistics
from reelway.platform.rollout.metric_names import RECEIVED_OUTCOMES
from reelway.platform.rollout.policy import Slice
from reelway.serving.outcomes.batch_worker import BatchWorker
from reelway.serving.outcomes.exposition import prometheus_text
from reelway.serving.outcomes.exposures import ExposureBatch
from reelway.serving.outcomes.ledger import Ledger
from reelway.serving.outcomes.outcome_store import OutcomeStore
from reelway.serving.outcomes.reported import OutcomeColumns
from reelway.serving.outcomes.viewer_sums import statistics_of

log = logging.getLogger(__name__)

MAX_QUEUED_ROWS: Final = 500_000
"""Queued rows above which new ones are rejected: some seconds of work."""
MAX_ROWS_PER_COMMIT: Final = 50_000
CLEANUP_INTERVAL_S: Final = 60.0
CLEANUP_BATCH_ROWS: Final = 5_000

_Request = ExposureBatch | OutcomeColumns | str
"""The string is the id of a rollout to retire."""


class OutcomeCollector:
    """Counts the impressions of rollouts and the outcomes that viewers reported for them.

    Futures are ``concurrent.futures.Future``: ``.result()`` in a thread, ``await asyncio.wrap_future(...)`` in a loop.
    They end when the transaction is on disk, or with a ``StorageError``: then nothing of the transaction was counted.

    Args:
        path: the SQLite file, created when it does not exist. One process at a time holds it.
        clock: Unix seconds; decides whether an outcome is late.
        keep_rollouts: how many of the newest rollouts stay in memory and in the metrics.
        commit_every_s: shortest time between two commits. After a rest, the first commit is immediate.
        wait_s: how long to wait for another process to release the file.

    Raises:
        MalformedFileError: if the file is not an outcome store.
        StorageError: if it cannot be opened, is held by another process, or has another schema version.
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
        self._lock = threading.Lock()
        self._refused = 0
        self._worker = BatchWorker[_Request, dict[str, int]](
            "outcome collector",
            self._count,
            max_queued_rows=MAX_QUEUED_ROWS,
            max_batch_rows=MAX_ROWS_PER_COMMIT,
            interval_s=commit_every_s,
            housekeeping=self._clean,
            on_close=self._store.close,
        )

    def record_exposures(self, batch: ExposureBatch) -> Future[dict[str, int]]:
        """Counts a router's exposures, once per batch number.

        Raises:
            ServingError: if too many rows are queued, or the collector is closed. None of the batch was accepted.
        """
        return self._worker.submit(batch, len(batch.arm))

    def record_outcomes(self, outcomes: OutcomeColumns) -> Future[dict[str, int]]:
        """Counts outcomes. The future's result is the number of outcomes by status (``RECEIVED_OUTCOMES``).

        Raises:
            ServingError: see ``record_exposures``.
        """
        return self._worker.submit(outcomes, len(outcomes))

    def retire(self, rollout_id: str) -> Future[dict[str, int]]:
        """Ends a rollout: its sums stay unchanged, and outcomes submitted for it later get the status ``retired``.

        Raises:
            ServingError: see ``record_exposures``.
        """
        return self._worker.submit(rollout_id, 1, ends_batch=True)

    def count_refused(self, outcomes: int) -> None:
        """Counts outcomes rejected for their token or value, since the start of the process."""
        with self._lock:
            self._refused += outcomes

    def metrics_text(self) -> bytes:
        """Returns the committed counts in Prometheus' text format, with the names of ``metric_names``."""
        return prometheus_text(self._ledger.snapshot, self._refused)

    def statistics(self, rollout_id: str) -> dict[tuple[Arm, Slice], dict[str, ArmStatistics]]:
        """A rollout's committed statistics by metric; for an arm that changed its release, its first release's."""
        statistics: dict[tuple[Arm, Slice], dict[str, ArmStatistics]] = {}
        for arm, sums_SK in self._ledger.snapshot.sums.items():
            if arm.rollout == rollout_id:
                for slice_, metrics in statistics_of(sums_SK).items():
                    statistics.setdefault((arm.arm, slice_), metrics)
        return statistics

    def close(self) -> None:
        """Rejects new requests, counts the accepted ones and closes the file. A second call does nothing."""
        self._worker.close()

    def _count(self, requests: Sequence[_Request]) -> list[dict[str, int]]:
        retired = [request for request in requests if isinstance(request, str)]  # at most one: it ends the batch
        statuses = iter(
            self._ledger.apply(
                [request for request in requests if isinstance(request, ExposureBatch)],
                [request for request in requests if isinstance(request, OutcomeColumns)],
                retired[0] if retired else "",
            )
        )
        return [_counts(next(statuses)) if isinstance(request, OutcomeColumns) else {} for request in requests]

    def _clean(self) -> float:
        try:
            return 1.0 if self._ledger.clean(CLEANUP_BATCH_ROWS) else CLEANUP_INTERVAL_S
        except Exception:  # only the size of the file depends on it
            log.exception("expired outcomes were not deleted; trying again in %g s", CLEANUP_INTERVAL_S)
            return CLEANUP_INTERVAL_S


def _counts(status_N: NDArray[np.int64]) -> dict[str, int]:
    counts = np.bincount(status_N, minlength=len(RECEIVED_OUTCOMES)).tolist()
    return dict(zip(RECEIVED_OUTCOMES, counts, strict=True))
