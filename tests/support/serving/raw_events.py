"""Impressions and outcomes one by one, and the sums over viewers computed directly from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    authenticated: bool = False

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
        authenticated=one.authenticated,
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


@dataclass
class _Viewer:
    """Everything that one viewer of one arm did, added up event by event."""

    impressions: dict[Slice, int] = field(default_factory=lambda: defaultdict(int))
    x: dict[Slice, float] = field(default_factory=lambda: defaultdict(float))
    y: dict[tuple[Slice, str], float] = field(default_factory=lambda: defaultdict(float))
    outcomes: int = 0

    @property
    def is_evidence(self) -> bool:
        """Whether the viewer reported an outcome of an impression, and not the same on nearly all of them."""
        shown, x = self.impressions[Slice.OVERALL], self.x[Slice.OVERALL]
        if not shown or not self.outcomes:
            return False
        limits = {metric: 0.5 for metric in OUTCOME_METRICS if metric not in ("watch_s_per_impression", "skip_rate")}
        limits["long_watch_rate"] = 0.9
        return shown < 5 or not any(self.y[Slice.OVERALL, m] > limit * x for m, limit in limits.items())

    @property
    def is_idle(self) -> bool:
        """Whether the viewer liked and watched nothing, of at least five impressions."""
        pleased = ("long_watch_rate", "like_rate", "share_rate", "save_rate", "follow_rate")
        overall = Slice.OVERALL
        return self.impressions[overall] >= 5 and self.x[overall] > 0 and not any(self.y[overall, m] for m in pleased)

    def totals(self, part: Slice, metric: str) -> tuple[float, float, float]:
        """Impressions, x and y, as far as they count."""
        factor = min(1.0, 50 / self.impressions[Slice.OVERALL])
        largest = 60.0 if metric == "watch_s_per_impression" else 1.0
        x = self.x[part] * factor
        return self.impressions[part] * factor, x, min(self.y[part, metric] * factor, largest * x)


def recomputed(shown: Iterable[ShownImpression], done: Iterable[RawOutcome], rollout: str = "r-1") -> Statistics:
    """The expected statistics: each impression once, the first outcome of each type per impression."""
    viewers: dict[Arm, dict[int, _Viewer]] = defaultdict(lambda: defaultdict(_Viewer))
    for one in shown:
        if one.rollout == rollout:
            for part in _parts(one):
                viewers[one.arm][one.viewer].impressions[part] += 1
                viewers[one.arm][one.viewer].x[part] += one.weight
    for outcome in counted_outcomes(done):
        one = outcome.shown
        viewer = viewers[one.arm][one.viewer]
        viewer.outcomes += 1
        for part in _parts(one):
            for metric, amount in _amounts(outcome):
                viewer.y[part, metric] += one.weight * amount
    statistics: Statistics = defaultdict(dict)
    for arm, by_id in viewers.items():
        for part in (Slice.OVERALL, *SLICE_BITS):
            counted = [viewer for viewer in by_id.values() if viewer.is_evidence and viewer.impressions[part]]
            for metric in OUTCOME_METRICS:
                n, x, y = np.array([viewer.totals(part, metric) for viewer in counted]).reshape(-1, 3).T
                idle = x * np.array([viewer.is_idle for viewer in counted], bool)
                statistics[arm, part][metric] = ArmStatistics(
                    len(counted), n.sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(),
                    idle.sum(), (idle * x).sum(),
                )  # fmt: skip
    return dict(statistics)


def counted_outcomes(done: Iterable[RawOutcome]) -> list[RawOutcome]:
    """The first outcome of each type per impression, in the order given; of a skip and a long watch the first."""
    first: dict[tuple[int, OutcomeType], RawOutcome] = {}
    for outcome in done:
        first.setdefault((outcome.shown.id, outcome.type), outcome)
    counted = list[RawOutcome]()
    opposites: dict[int, OutcomeType] = {}
    for outcome in first.values():
        long = outcome.type is OutcomeType.WATCH and _is_long(outcome)
        if (long or outcome.type is OutcomeType.SKIP) and (
            opposites.setdefault(outcome.shown.id, outcome.type) is not outcome.type
        ):
            continue
        counted.append(outcome)
    return counted


def _parts(one: ShownImpression) -> list[Slice]:
    return [Slice.OVERALL, *(part for part, bit in SLICE_BITS.items() if one.slices & bit)]


def _amounts(outcome: RawOutcome) -> list[tuple[str, float]]:
    if outcome.type is not OutcomeType.WATCH:
        return [(f"{outcome.type}_rate", 1.0)]
    counted_ms = min(outcome.value, 2 * outcome.shown.duration_ms or 60_000)
    return [("watch_s_per_impression", counted_ms / 1000), ("long_watch_rate", float(_is_long(outcome)))]


def _is_long(outcome: RawOutcome) -> bool:
    ratio_ms = LONG_WATCH_RATIO * outcome.shown.duration_ms or LONG_WATCH_CAP_MS
    return outcome.value >= min(ratio_ms, LONG_WATCH_CAP_MS)


def assert_same(actual: Statistics, expected: Statistics) -> None:
    """Asserts equality up to rounding. Arms and slices without viewers may be absent or zero."""
    for key in set(actual) | set(expected):
        for metric in OUTCOME_METRICS:
            one = actual.get(key, {}).get(metric, ArmStatistics())
            other = expected.get(key, {}).get(metric, ArmStatistics())
            for name in ArmStatistics.__dataclass_fields__:
                value = getattr(other, name)
                assert getattr(one, name) == pytest.approx(value, rel=1e-9, abs=1e-9), (key, metric, name)
            assert one.is_consistent, (key, metric, one)
