"""The rules by which impressions and outcomes of the event log are counted, one transaction per batch.

All times are those of the log, so a second reading of the same records gives the same sums.

Only a few rows are in memory: the sums of the newest rollouts' arms. Viewer totals and counted types stay on disk and
are read for each batch. Memory therefore does not grow with the number of viewers, and a killed process loses nothing
that was committed.
"""

# Shapes: N outcomes, R rows of exposures, U viewers (of one arm each), S slices, K sums

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.events import OUTCOME_HORIZON_S
from reelway.platform.eventlog import Offsets
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES
from reelway.platform.retention import DAY_S, retention
from reelway.platform.rollout.metric_names import RECEIVED_OUTCOMES
from reelway.serving.outcomes.counted_types import COUNTED, judge_types
from reelway.serving.outcomes.exposures import ArmKey
from reelway.serving.outcomes.log_rows import LONG_WATCH, METRIC_OF_KIND, ExposureRows, OutcomeRows
from reelway.serving.outcomes.outcome_store import (
    MAX_ARMS,
    ArmRow,
    OutcomeStore,
    ReceivedKey,
    RolloutRow,
)
from reelway.serving.outcomes.viewer_keys import arm_ids_of, seen_elsewhere, viewer_keys
from reelway.serving.outcomes.viewer_sums import (
    FIRST_METRIC_COLUMN,
    X_COLUMN,
    TotalsDelta,
    apply_delta,
    growth_by_arm,
    without_rounding,
)

I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

LATE, RETIRED, OUTSIDE, FUTURE, EARLY, UNAUTHENTICATED = (
    RECEIVED_OUTCOMES.index(name) for name in ("late", "retired", "outside", "future", "early", "unauthenticated")
)
HOUR_S: Final = 3600
CLEANUP_SLACK_S: Final = 3600
"""Extra retention in seconds, for clocks of different machines."""
EXPOSURE_HORIZON_S: Final = 3600
"""A slate that reaches the log later than this after it was shown is not counted. Routers give up after a minute."""
MAX_LIVE_ARMS: Final = MAX_ARMS // 2
"""With one more arm, the least used arm is dropped. The other numbers are those of arms that were dropped lately."""
CLOCK_SKEW_S: Final = 300
"""Largest difference of two clocks. An outcome that is further in the future, or before its impression, is refused."""
RECEIVED_RETENTION_S: Final = 14 * 24 * 3600
"""A release without an outcome for this many seconds leaves the metrics."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Committed counts, for readers in other threads. Sums of each arm: ``[S, K]``; audience of each arm: ``[A]``."""

    sums: Mapping[ArmKey, NDArray[np.float64]]
    audience: Mapping[ArmKey, NDArray[np.float64]]
    received: Mapping[ReceivedKey, int]
    late_slates: int  # since the start of the process
    unauthenticated_slates: int  # since the start of the process
    bounded_watches: int  # since the start of the process
    dropped_arms: int  # since the start of the process


class Ledger:
    """Counts exposures and outcomes. One thread calls it; any thread may read ``snapshot``.

    Args:
        keep_rollouts: with one more rollout, the rollout with the oldest last exposure ends.
        require_authenticated: whether only viewers who proved their identity are evidence.
    """

    def __init__(self, store: OutcomeStore, *, keep_rollouts: int, require_authenticated: bool = False) -> None:
        self._store = store
        self._viewers_s = retention().collector_days * DAY_S
        self._keep = keep_rollouts
        self._require_authenticated = require_authenticated
        self._late_slates = 0
        self._unauthenticated_slates = 0
        self._bounded_watches = 0
        self._dropped_arms = 0
        self._stale = True
        with self._changing():
            pass

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A transaction. If it fails, memory is reloaded from the file in the next transaction."""
        with self._store.transaction():
            if self._stale:
                self._rollouts = self._store.rollouts()
                self._arms = self._store.arms()
                self._received: Counter[ReceivedKey] = Counter(self._store.received())
            self._stale = True
            self._dropped_numbers: set[int] = set()
            yield
        self._stale = False
        sums = {arm: known.sums for arm, known in self._arms.items()}
        self.snapshot = Snapshot(
            sums,
            {arm: known.audience for arm, known in self._arms.items()},
            dict(self._received),
            late_slates=self._late_slates,
            unauthenticated_slates=self._unauthenticated_slates,
            bounded_watches=self._bounded_watches,
            dropped_arms=self._dropped_arms,
        )

    def apply(
        self,
        exposures: Sequence[ExposureRows],
        outcomes: Sequence[OutcomeRows],
        positions: Mapping[str, Offsets],
        erased: I64 | None = None,
    ) -> list[I64]:
        """Counts everything in one transaction. Returns the status of each outcome as ``RECEIVED_OUTCOMES`` codes.

        Args:
            positions: log -> the offsets after these rows, stored in the same transaction.
            erased: viewers whose totals are deleted. The sums of their arms stay; they do not identify anybody.

        Raises:
            StorageError: if the transaction fails; nothing was counted.
        """
        with self._changing():
            parts = [part for rows in exposures if (part := self._apply_exposures(rows)) is not None]
            statuses = []
            for columns in outcomes:
                status_N, part = self._apply_outcomes(columns)
                statuses.append(status_N)
                if part is not None:
                    parts.append(part)
            if parts:
                self._update_totals(parts)
            if erased is not None and len(erased):
                self._store.erase_viewers(erased)
            for log, position in positions.items():
                self._store.write_position(log, position)
        return statuses

    def position(self, log: str) -> Offsets:
        """The offsets up to which a log is counted; see ``OutcomeStore.position``."""
        with self._changing():
            return self._store.position(log)

    def clean(self, now: float, limit: int) -> int:
        """Deletes expired and dropped rows, at most ``limit`` of each kind; returns the number of deleted rows.

        Args:
            now: Unix time before which the log has no unread records.
        """
        old = now - OUTCOME_HORIZON_S - CLEANUP_SLACK_S
        with self._changing():
            living = {arm.rollout for arm in self._arms}
            for rollout, known in list(self._rollouts.items()):
                if known.retired and known.exposed_at < old and rollout not in living:
                    del self._rollouts[rollout]
                    self._store.delete_rollout(rollout)
            deleted = sum(
                self._store.delete_totals(known, limit)
                for arm, known in self._arms.items()
                if self._rollouts[arm.rollout].exposed_at < now - self._viewers_s
            )
            return deleted + self._store.delete_expired(
                seen_before_hour=int(old // HOUR_S),
                slates_before_hour=int((now - EXPOSURE_HORIZON_S - CLEANUP_SLACK_S) // HOUR_S),
                received_before=now - RECEIVED_RETENTION_S,
                limit=limit,
            )

    def _apply_exposures(self, rows: ExposureRows) -> TotalsDelta | None:
        late_R = rows.logged_at > rows.shown_at + EXPOSURE_HORIZON_S
        self._late_slates += len(np.unique(rows.request_id[late_R]))
        unproven_R = ~self._admitted(rows.authenticated)
        self._unauthenticated_slates += len(np.unique(rows.request_id[unproven_R & ~late_R]))
        fit_R = ~late_R & ~unproven_R
        for code in np.unique(rows.arm[fit_R]).tolist():
            shown = fit_R & (rows.arm == code)
            exposed_at = float(np.minimum(rows.shown_at, rows.logged_at)[shown].max())
            self._register_rollout(rows.arms[code].rollout, exposed_at)
        arm_R, live_R = self._arm_numbers(rows.arms, rows.arm)
        counted = self._first_of_slate(rows, np.flatnonzero(live_R & fit_R))
        if not len(counted):
            return None
        count = rows.count[counted]
        return TotalsDelta(
            key=viewer_keys(arm_R[counted], rows.viewer_id[counted]),
            slices=rows.slices[counted],
            column=np.full(len(counted), X_COLUMN),
            amount=count.astype(np.float64) * rows.weight[counted],
            impressions=count,
            outcomes=np.zeros(len(counted), np.int64),
            weight=rows.weight[counted],
        )

    def _admitted(self, authenticated: Bools) -> Bools:
        """Returns which rows may be evidence."""
        return authenticated | (not self._require_authenticated)

    def _first_of_slate(self, rows: ExposureRows, candidates: I64) -> I64:
        """Returns the rows whose slate was not counted before, and records their slates as counted."""
        hour = (rows.shown_at[candidates] // HOUR_S).astype(np.int64)
        new = np.zeros(len(candidates), bool)
        for hour_ in np.unique(hour).tolist():
            index = np.flatnonzero(hour == hour_)
            ids, owner = np.unique(rows.request_id[candidates[index]], return_inverse=True)
            new[index] = self._store.add_slates(hour_, ids)[owner]
        return candidates[new]

    def _apply_outcomes(self, columns: OutcomeRows) -> tuple[I64, TotalsDelta | None]:
        last_N = columns.issued_at + OUTCOME_HORIZON_S
        late_N = (columns.logged_at > last_N) | (columns.done_at > last_N)
        outside_N = np.array([not arm.rollout for arm in columns.arms], bool)[columns.arm]
        unproven_N = ~self._admitted(columns.authenticated)
        future_N = np.maximum(columns.done_at, columns.issued_at) > columns.logged_at + CLOCK_SKEW_S
        early_N = np.isfinite(columns.done_at) & (columns.done_at < columns.issued_at - CLOCK_SKEW_S)
        fit_N = ~(outside_N | unproven_N | late_N | future_N | early_N)
        for code in np.unique(columns.arm[fit_N]).tolist():
            rollout = columns.arms[code].rollout
            if rollout not in self._rollouts:  # shown, but its slate has not been read yet
                shown_at = np.minimum(columns.issued_at, columns.logged_at)[fit_N & (columns.arm == code)]
                self._register_rollout(rollout, float(shown_at.max()))
        arm_N, live_N = self._arm_numbers(columns.arms, columns.arm)
        status_N = np.select(
            [outside_N, unproven_N, late_N, future_N, early_N, live_N],
            [OUTSIDE, UNAUTHENTICATED, LATE, FUTURE, EARLY, COUNTED],
            RETIRED,
        )
        candidates = np.flatnonzero(status_N == COUNTED)
        status_N[candidates] = self._judge_types(columns, candidates)
        self._count_received(columns, status_N)
        counted = np.flatnonzero(status_N == COUNTED)
        if not len(counted):
            return status_N, None
        self._bounded_watches += int(columns.bounded[counted].sum())
        return status_N, _outcome_part(columns, viewer_keys(arm_N, columns.viewer_id), counted)

    def _judge_types(self, columns: OutcomeRows, rows: I64) -> I64:
        """Returns the status of outcomes by ``counted_types``, and records the counted types of their impressions."""
        impression, kind, long_watch = columns.impression_id[rows], columns.kind[rows], columns.long_watch[rows]
        hour = (columns.issued_at[rows] // HOUR_S).astype(np.int64)
        status = np.empty(len(rows), np.int64)
        for hour_ in np.unique(hour).tolist():
            index = np.flatnonzero(hour == hour_)
            ids, owner = np.unique(impression[index], return_inverse=True)
            before = self._store.read_counted_types(hour_, ids)
            status[index], after = judge_types(kind[index], long_watch[index], owner, before)
            changed = np.flatnonzero(after != before)
            self._store.write_counted_types(hour_, ids[changed], after[changed])
        return status

    def _update_totals(self, parts: Sequence[TotalsDelta]) -> None:
        """Adds all rows of a transaction to viewer totals and arm sums."""
        additions = TotalsDelta.joined(parts)
        by_id = {arm.id: arm for arm in self._arms.values()}
        live = np.isin(arm_ids_of(additions.key), list(by_id))
        additions = additions.take(live)  # without those of arms that a later row of the transaction made drop
        key_U = np.unique(additions.key)
        arm_ids, arm_U = np.unique(arm_ids_of(key_U), return_inverse=True)
        before = self._store.read_viewers(key_U)
        elsewhere_U = np.zeros(len(key_U), bool)
        new_U = ~before.shown
        shown = additions.key[additions.impressions > 0]
        elsewhere_U[new_U] = seen_elsewhere(key_U[new_U], shown, self._peers(), self._store.are_known)
        after = apply_delta(before, additions, key_U, elsewhere_U)
        self._store.write_viewers(key_U, after)
        sums, audience = growth_by_arm(before, after, arm_U, len(arm_ids))
        for arm_id, grown, joined in zip(arm_ids.tolist(), sums, audience, strict=True):
            arm = by_id[arm_id]
            arm.sums = without_rounding(arm.sums + grown)  # new arrays, because the snapshot holds the previous ones
            arm.audience = np.maximum(arm.audience + joined, 0.0)
            self._store.write_sums(arm)

    def _peers(self) -> dict[int, list[int]]:
        """Returns the numbers of the other arms of each arm's rollout."""
        by_rollout: dict[str, list[int]] = {}
        for arm, known in self._arms.items():
            by_rollout.setdefault(arm.rollout, []).append(known.id)
        return {one: [peer for peer in ids if peer != one] for ids in by_rollout.values() for one in ids}

    def _register_rollout(self, rollout: str, exposed_at: float) -> None:
        """Registers a rollout; with too many rollouts, drops those with the oldest last exposure."""
        known = self._rollouts.get(rollout)
        if known is None:
            known = self._rollouts[rollout] = RolloutRow(exposed_at)
        known.exposed_at = max(known.exposed_at, exposed_at)
        self._store.write_rollout(rollout, known)
        retained = [name for name, row in self._rollouts.items() if not row.retired or self._arms_of(name)]
        while len(retained) > self._keep:
            oldest = min(retained, key=lambda name: (not self._rollouts[name].retired, self._rollouts[name].exposed_at))
            retained.remove(oldest)
            self._drop_rollout(oldest)

    def _drop_rollout(self, rollout: str) -> None:
        self._retire(self._rollouts[rollout], rollout)
        for arm in self._arms_of(rollout):
            self._drop_arm(arm)

    def _drop_arm(self, arm: ArmKey) -> None:
        known = self._arms.pop(arm)
        self._dropped_numbers.add(known.id)
        self._store.drop_arm(known)

    def _retire(self, known: RolloutRow, rollout: str) -> None:
        known.retired = True
        self._store.write_rollout(rollout, known)

    def _arms_of(self, rollout: str) -> list[ArmKey]:
        return [arm for arm in self._arms if arm.rollout == rollout]

    def _arm_numbers(self, arms: Iterable[ArmKey], index_N: I64) -> tuple[I64, Bools]:
        """Returns each row's arm number in the file, and whether it is counted. Adds new arms of active rollouts."""
        numbers, live = [], []
        for arm in arms:
            rollout = self._rollouts.get(arm.rollout)
            active = rollout is not None and not rollout.retired
            known = self._known_arm(arm) if active else None
            numbers.append(-1 if known is None else known.id)
            live.append(known is not None)
        return np.array(numbers, np.int64)[index_N], np.array(live, bool)[index_N]

    def _known_arm(self, arm: ArmKey) -> ArmRow | None:
        """Returns the row of an arm, which may be new; None if a transaction has more new arms than numbers exist."""
        known = self._arms.get(arm) or self._store.add_arm(arm, self._dropped_numbers)
        if known is None:
            self._dropped_arms += 1
            return None
        self._arms[arm] = known
        if len(self._arms) > MAX_LIVE_ARMS:
            self._dropped_arms += 1
            self._drop_arm(self._least_used_arm(arm.rollout))
        return known

    def _least_used_arm(self, rollout: str) -> ArmKey:
        """Returns the first arm of the rollout with the oldest last exposure, of this one only if no other has arms."""
        return min(self._arms, key=lambda arm: (arm.rollout == rollout, self._rollouts[arm.rollout].exposed_at))

    def _count_received(self, columns: OutcomeRows, status_N: I64) -> None:
        code_N = (columns.arm * len(OUTCOME_TYPES) + columns.kind) * len(RECEIVED_OUTCOMES) + status_N
        codes, counts = np.unique(code_N, return_counts=True)
        fresh: Counter[ReceivedKey] = Counter()
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            rest, status = divmod(code, len(RECEIVED_OUTCOMES))
            arm, kind = columns.arms[rest // len(OUTCOME_TYPES)], OUTCOME_TYPES[rest % len(OUTCOME_TYPES)]
            fresh[arm.release, arm.arm.value, kind.value, RECEIVED_OUTCOMES[status]] += count
        self._received.update(fresh)
        if fresh:
            self._store.add_received(fresh.items(), float(columns.logged_at.max()))


def _outcome_part(columns: OutcomeRows, key_N: I64, counted: I64) -> TotalsDelta:
    """Counted outcomes as additions. A long watch is a second row next to its watch."""
    long = counted[columns.long_watch[counted]]
    rows = np.concatenate([counted, long])
    amount = np.concatenate([columns.amount[counted], np.ones(len(long))])
    metric = np.concatenate([METRIC_OF_KIND[columns.kind[counted]], np.full(len(long), LONG_WATCH)])
    return TotalsDelta(
        key=key_N[rows],
        slices=columns.slices[rows],
        column=FIRST_METRIC_COLUMN + metric,
        amount=amount * columns.weight[rows],
        impressions=np.zeros(len(rows), np.int64),
        outcomes=np.repeat([1, 0], [len(counted), len(long)]),
        weight=columns.weight[rows],
    )
