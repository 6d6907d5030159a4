"""Impressions and outcomes one by one, and the sums over viewers computed directly from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from reelway.platform.contracts.api import ReportedOutcome
from reelway.platform.contracts.events import LONG_WATCH_CAP_MS, LONG_WATCH_RATIO, Arm, OutcomeType
from reelway.platform.eventlog import LogRecord, StoredRecord
from reelway.platform.eventlog.exposure_events import encode_exposures
from reelway.platform.eventlog.outcome_events import encode_outcomes
from reelway.platform.rollout.evidence import ArmStatistics
from reelway.platform.rollout.metric_names import OUTCOME_METRICS
from reelway.platform.rollout.policy import Slice
from reelway.platform.tokens import SLICE_BITS, ImpressionToken, TokenSigner
from reelway.serving.outcomes.event_log_writer import logged_outcomes
from reelway.serving.outcomes.exposures import ArmKey, SlateExposure, exposure_rows
from reelway.serving.outcomes.ledger import Ledger
from reelway.serving.outcomes.log_rows import ExposureRows, OutcomeRows, read_exposure_rows, read_outcome_rows
from reelway.serving.outcomes.reported import OutcomeColumns, read_outcomes
from reelway.serving.outcomes.viewer_sums import statistics_of

SIGNER = TokenSigner(b"a secret of the tests, long enough")
RELEASES = {Arm.STABLE: "ab" * 32, Arm.CANARY: "cd" * 32, Arm.HOLDOUT: "ab" * 32}
NOW = 1_800_000_000.0

Statistics = dict[tuple[Arm, Slice], dict[str, ArmStatistics]]


@dataclass(frozen=True)
class ShownImpression:
    """One impression."""

    id: int
    viewer: int
    arm: Arm
    weight: float
    slices: int
    duration_ms: int = 20_000
    rollout: str = "r-1"
    at: float = NOW
    release: str = ""  # by default the arm's

    @property
    def exposed_arm(self) -> ArmKey:
        return ArmKey(self.rollout, self.arm, self.release or RELEASES[self.arm])

    @property
    def token(self) -> str:
        return SIGNER.sign(
            ImpressionToken(
                self.id, 1, self.viewer, 5, 0, self.exposed_arm.release, self.arm, "ann", 0.5, self.at,
                self.rollout, self.weight, self.slices, self.duration_ms, 7, 3,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class RawOutcome:
    """One outcome."""

    shown: ShownImpression
    type: OutcomeType
    value: float = 1.0

    @property
    def reported(self) -> ReportedOutcome:
        return ReportedOutcome(token=self.shown.token, type=self.type, value=self.value)


def slate_of(one: ShownImpression) -> SlateExposure:
    """A slate of one video, as a router records it. Its request id is the impression's id."""
    return SlateExposure(
        one.id, one.viewer, one.exposed_arm, one.weight, one.at, one.at, "phone", None, None,
        impression_id=np.array([one.id]), video_id=np.array([5]), slices=np.array([one.slices], np.int8),
        source=np.array([0]), score=np.zeros(1, np.float32), propensity=np.ones(1, np.float32),
        creator_id=np.array([7]), topic=np.array([3], np.int32), duration_ms=np.array([one.duration_ms], np.int32),
    )  # fmt: skip


def exposure_record(shown: Sequence[ShownImpression]) -> LogRecord:
    """All slates in one record."""
    rows = exposure_rows([slate_of(one) for one in shown])
    (record,) = encode_exposures(rows, 1, 1 << 20)
    return record


def outcome_record(done: Sequence[RawOutcome], logged_at: float = NOW) -> LogRecord:
    """All outcomes in one record."""
    logged_us = round(logged_at * 1e6)
    (record,) = encode_outcomes(logged_outcomes([reported_columns(done)], logged_us), 1, 1 << 20)
    return record


def stored(record: LogRecord, logged_at: float, offset: int = 1) -> StoredRecord:
    return StoredRecord(0, offset, round(logged_at * 1e6), record.payload)


def exposures_of(shown: Sequence[ShownImpression], logged_at: float | None = None) -> list[ExposureRows]:
    """The slates as the collector reads them from the log; each is logged when it was shown, or at ``logged_at``."""
    by_time: dict[float, list[ShownImpression]] = {}
    for one in shown:
        by_time.setdefault(one.at if logged_at is None else logged_at, []).append(one)
    return [read_exposure_rows(stored(exposure_record(group), at)) for at, group in by_time.items()]


def outcomes_of(done: Sequence[RawOutcome], logged_at: float = NOW) -> list[OutcomeRows]:
    """The outcomes as the collector reads them from one record of the log."""
    return [read_outcome_rows(stored(outcome_record(done, logged_at), logged_at))] if done else []


def reported_columns(done: Sequence[RawOutcome]) -> OutcomeColumns:
    """The outcomes as a router reads them from a request."""
    columns, refused = read_outcomes([one.reported for one in done], SIGNER)
    assert not refused
    return columns


def statistics(ledger: Ledger) -> Statistics:
    """Committed statistics of a ledger with one rollout and one release per arm."""
    return {
        (arm.arm, part): metrics
        for arm, sums in ledger.snapshot.sums.items()
        for part, metrics in statistics_of(sums).items()
    }


def recomputed(shown: Iterable[ShownImpression], done: Iterable[RawOutcome], rollout: str = "r-1") -> Statistics:
    """The expected statistics: each impression once, the first outcome of each type per impression."""
    x: dict[tuple[Arm, Slice], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    y: dict[tuple[Arm, Slice], dict[tuple[int, str], float]] = defaultdict(lambda: defaultdict(float))
    impressions: dict[tuple[Arm, Slice], int] = defaultdict(int)
    for one in shown:
        for part in _parts(one):
            impressions[one.arm, part] += one.rollout == rollout
            x[one.arm, part][one.viewer] += one.weight * (one.rollout == rollout)
    first: dict[tuple[int, OutcomeType], RawOutcome] = {}
    for outcome in done:
        first.setdefault((outcome.shown.id, outcome.type), outcome)
    for outcome in first.values():
        one = outcome.shown
        for part in _parts(one):
            x[one.arm, part][one.viewer] += 0.0
            for metric, amount in _amounts(outcome):
                y[one.arm, part][one.viewer, metric] += one.weight * amount
    return {
        key: {
            metric: ArmStatistics(
                viewers=len(viewers),
                impressions=impressions[key],
                sum_x=sum(viewers.values()),
                sum_y=sum(y[key][v, metric] for v in viewers),
                sum_xx=sum(value**2 for value in viewers.values()),
                sum_yy=sum(y[key][v, metric] ** 2 for v in viewers),
                sum_xy=sum(value * y[key][v, metric] for v, value in viewers.items()),
            )
            for metric in OUTCOME_METRICS
        }
        for key, viewers in x.items()
    }


def _parts(one: ShownImpression) -> list[Slice]:
    return [Slice.OVERALL, *(part for part, bit in SLICE_BITS.items() if one.slices & bit)]


def _amounts(outcome: RawOutcome) -> list[tuple[str, float]]:
    if outcome.type is not OutcomeType.WATCH:
        return [(f"{outcome.type}_rate", 1.0)]
    long = outcome.value >= min(LONG_WATCH_RATIO * outcome.shown.duration_ms, LONG_WATCH_CAP_MS)
    return [("watch_s_per_impression", outcome.value / 1000), ("long_watch_rate", float(long))]


def assert_same(actual: Statistics, expected: Statistics) -> None:
    """Asserts equality up to rounding. Arms and slices without viewers may be absent or zero."""
    for key in set(actual) | set(expected):
        for metric in OUTCOME_METRICS:
            one = actual.get(key, {}).get(metric, ArmStatistics())
            other = expected.get(key, {}).get(metric, ArmStatistics())
            for name in ArmStatistics.__dataclass_fields__:
                value = getattr(other, name)
                assert getattr(one, name) == pytest.approx(value, rel=1e-9, abs=1e-12), (key, metric, name)
            assert one.is_consistent, (key, metric, one)
