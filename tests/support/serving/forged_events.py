"""Honest and forged viewers of a rollout, as rows that the ledger counts, and the evidence that follows from them."""

# Shapes: N impressions

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from tests.support.serving.raw_events import NOW, RELEASES

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.sources.parity_findings import ParityFindings
from reelway.platform.rollout.sources.series_reader import UP, SeriesKey, SeriesReadResult
from reelway.platform.rollout.sources.snapshot import build_snapshot
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.serving.outcomes.exposition import prometheus_text
from reelway.serving.outcomes.exposures import ArmKey
from reelway.serving.outcomes.ledger import Ledger
from reelway.serving.outcomes.log_rows import ExposureRows, OutcomeRows
from reelway.serving.outcomes.outcome_store import OutcomeStore

DURATION_MS = 20_000.0
DAY_MS = 24 * 3_600_000.0
STATE = RolloutState(
    id="r-1", stable_release=RELEASES[Arm.STABLE], canary_release=RELEASES[Arm.CANARY], phase=Phase.STEPPING, step=0,
    canary_bp=5_000, started_at=NOW - 600, changed_at=NOW - 600, tick_at=NOW - 10,
)  # fmt: skip


class ForgedRollout:
    """A rollout with both arms at 50 %, whose viewers a test invents."""

    def __init__(self, folder: Path) -> None:
        self._store = OutcomeStore(folder / "outcomes.db")
        self._ledger = Ledger(self._store, keep_rollouts=2)
        self._next_id = 1

    def close(self) -> None:
        self._store.close()

    def honest(self, arm: Arm, viewers: int, *, long_watch: float = 0.4, impressions: int = 10, seed: int = 0) -> None:
        """Adds viewers who watch ``long_watch`` of their videos to the end, and 5 s of the others."""
        rng = np.random.default_rng((seed, arm is Arm.CANARY))
        taste = rng.beta(10 * long_watch, 10 * (1 - long_watch), viewers)
        self.add(arm, viewers, impressions, lambda viewer: np.where(rng.random(len(viewer)) < taste[viewer], 19e3, 5e3))

    def add(
        self, arm: Arm, viewers: int, impressions: int, watch_ms: Callable[[NDArray[np.int64]], NDArray[np.float64]]
    ) -> None:
        """Adds viewers with one slate each. ``watch_ms``: index of the viewer of each impression -> reported watch."""
        first = self._next_id
        self._next_id += viewers * impressions
        self._ledger.apply([_slates(arm, first + np.arange(viewers), impressions)], [], {})
        viewer = np.repeat(np.arange(viewers), impressions)
        watched = watch_ms(viewer)
        told = np.flatnonzero(np.isfinite(watched))
        if len(told):
            self._ledger.apply([], [_watches(arm, first + told, first + viewer[told], watched[told])], {})

    def silent(self, arm: Arm, viewers: int, impressions: int = 20) -> None:
        """Adds viewers who ask and report nothing."""
        self.add(arm, viewers, impressions, lambda viewer: np.full(len(viewer), np.nan))

    def evidence(self, policy: RolloutPolicy) -> EvidenceSnapshot:
        """Returns the evidence that a controller reads from the collector's metrics."""
        page = prometheus_text(self._ledger.snapshot, {}, 0, NOW).decode()
        origin = {"instance": "one", "job": names.OUTCOMES_JOB}
        series = {SeriesKey.of(UP, origin): [Sample(NOW, 1.0)]}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                series[SeriesKey.of(sample.name, {**sample.labels, **origin})] = [Sample(NOW, sample.value)]
        return build_snapshot(policy, STATE, SeriesReadResult(series, ""), ParityFindings(problem="not made"), NOW)


def _slates(arm: Arm, viewer: NDArray[np.int64], impressions: int) -> ExposureRows:
    n = len(viewer)
    return ExposureRows(
        (ArmKey("r-1", arm, RELEASES[arm]),),
        arm=np.zeros(n, np.int64),
        request_id=viewer,
        viewer_id=viewer,
        shown_at=np.full(n, NOW),
        logged_at=np.full(n, NOW),
        weight=np.full(n, 0.5),
        slices=np.zeros(n, np.uint8),
        count=np.full(n, impressions),
        authenticated=np.zeros(n, bool),
    )


def _watches(
    arm: Arm, impression: NDArray[np.int64], viewer: NDArray[np.int64], watched_ms: NDArray[np.float64]
) -> OutcomeRows:
    n = len(viewer)
    return OutcomeRows(
        (ArmKey("r-1", arm, RELEASES[arm]),),
        arm=np.zeros(n, np.int64),
        impression_id=impression,
        viewer_id=viewer,
        issued_at=np.full(n, NOW),
        done_at=np.full(n, -np.inf),
        logged_at=np.full(n, NOW),
        weight=np.full(n, 0.5),
        slices=np.zeros(n, np.uint8),
        duration_ms=np.full(n, DURATION_MS),
        kind=np.full(n, OUTCOME_TYPES.index(OutcomeType.WATCH)),
        value=watched_ms,
        authenticated=np.zeros(n, bool),
    )
