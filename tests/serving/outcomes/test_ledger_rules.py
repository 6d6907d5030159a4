"""The status of outcomes: counted, duplicate, late, retired, outside; and repeated slates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.serving.raw_events import (
    NOW,
    RELEASES,
    RawOutcome,
    ShownImpression,
    assert_same,
    exposures_of,
    outcome_record,
    outcomes_of,
    recomputed,
    statistics,
)

from reelway.platform.contracts.events import OUTCOME_HORIZON_S, STRING_DICTIONARY_TYPE, Arm, OutcomeType
from reelway.platform.eventlog import StoredRecord
from reelway.platform.eventlog.arrow_records import encode_rows
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES, decode_outcomes
from reelway.platform.rollout.metric_names import AUDIENCE_GROUPS, AUDIENCE_STATISTICS, RECEIVED_OUTCOMES
from reelway.platform.rollout.policy import Slice
from reelway.serving.outcomes.exposures import ArmKey
from reelway.serving.outcomes.ledger import CLOCK_SKEW_S, EXPOSURE_HORIZON_S, MAX_LIVE_ARMS, Ledger
from reelway.serving.outcomes.log_rows import OutcomeRows, read_outcome_rows
from reelway.serving.outcomes.outcome_store import MAX_ARMS, OutcomeStore
from reelway.serving.outcomes.viewer_sums import MAX_IMPRESSIONS

SHOWN = ShownImpression(11, viewer=1, arm=Arm.CANARY, weight=0.5, slices=3)
LIKE = RawOutcome(SHOWN, OutcomeType.LIKE)


@dataclass
class LedgerFixture:
    """A ledger with a settable time of the log that can be restarted."""

    path: Path
    now: float = NOW
    require_authenticated: bool = False

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.store = OutcomeStore(self.path)
        self.ledger = Ledger(self.store, keep_rollouts=2, require_authenticated=self.require_authenticated)

    def restart(self) -> None:
        self.store.close()
        self.start()

    def expose(self, *shown: ShownImpression) -> None:
        """Counts slates that are shown now."""
        self.ledger.apply(exposures_of([replace(one, at=self.now) for one in shown]), [], {})

    def report(self, *done: RawOutcome) -> list[str]:
        (statuses,) = self.ledger.apply([], outcomes_of(done, self.now), {})
        return [RECEIVED_OUTCOMES[status] for status in statuses.tolist()]

    def rows(self, table: str) -> int:
        return int(self.store._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[LedgerFixture]:
    bench = LedgerFixture(tmp_path / "outcomes.db")
    yield bench
    bench.store.close()


def test_second_outcome_of_a_type_is_a_duplicate(bench: LedgerFixture) -> None:
    share = RawOutcome(SHOWN, OutcomeType.SHARE)
    assert bench.report(LIKE, LIKE, share) == ["counted", "duplicate", "counted"]
    assert bench.report(LIKE) == ["duplicate"]
    bench.restart()
    assert bench.report(share, RawOutcome(SHOWN, OutcomeType.SAVE)) == ["duplicate", "counted"]
    assert bench.ledger.snapshot.received[RELEASES[Arm.CANARY], "canary", "like", "duplicate"] == 2


def test_second_watch_of_an_impression_changes_nothing(bench: LedgerFixture) -> None:
    watch = RawOutcome(SHOWN, OutcomeType.WATCH, 3_000.0)
    assert bench.report(watch, replace(watch, value=20_000.0)) == ["counted", "duplicate"]
    assert_same(statistics(bench.ledger), recomputed([], [watch]))


def test_outcome_is_late_by_its_arrival(bench: LedgerFixture) -> None:
    bench.now = NOW + OUTCOME_HORIZON_S
    assert bench.report(LIKE) == ["counted"]
    bench.now += 1
    assert bench.report(LIKE, RawOutcome(SHOWN, OutcomeType.SHARE)) == ["late", "late"]


def test_outcome_is_late_by_its_event_time(bench: LedgerFixture) -> None:
    def at(seconds: float, logged_at: float = NOW) -> str:
        (rows,) = outcomes_of([LIKE], logged_at)
        (statuses,) = bench.ledger.apply([], [replace(rows, done_at=np.array([NOW + seconds]))], {})
        return RECEIVED_OUTCOMES[int(statuses[0])]

    assert at(OUTCOME_HORIZON_S + 1) == "late"
    assert at(OUTCOME_HORIZON_S, logged_at=NOW + OUTCOME_HORIZON_S) == "counted"
    assert at(CLOCK_SKEW_S + 1) == "future"
    assert at(-CLOCK_SKEW_S - 1) == "early"


@pytest.mark.parametrize("seconds", [CLOCK_SKEW_S, 0, -CLOCK_SKEW_S])
def test_clocks_may_differ_by_a_few_minutes(bench: LedgerFixture, seconds: int) -> None:
    (rows,) = outcomes_of([LIKE])
    (statuses,) = bench.ledger.apply([], [replace(rows, done_at=np.array([NOW + seconds]))], {})
    assert [RECEIVED_OUTCOMES[int(status)] for status in statuses] == ["counted"]


def test_impression_of_the_future_is_refused(bench: LedgerFixture) -> None:
    assert bench.report(RawOutcome(replace(SHOWN, at=NOW + CLOCK_SKEW_S + 1), OutcomeType.LIKE)) == ["future"]


SKIP = RawOutcome(SHOWN, OutcomeType.SKIP)
COMPLETE = RawOutcome(SHOWN, OutcomeType.WATCH, 20_000.0)
GLANCE = RawOutcome(SHOWN, OutcomeType.WATCH, 900.0)


@pytest.mark.parametrize(
    ("done", "statuses"),
    [
        ((SKIP, COMPLETE, GLANCE), ["counted", "contradicting", "duplicate"]),
        ((COMPLETE, SKIP, SKIP), ["counted", "contradicting", "duplicate"]),
        ((GLANCE, SKIP, COMPLETE), ["counted", "counted", "duplicate"]),
        ((SKIP, GLANCE), ["counted", "counted"]),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_skip_contradicts_a_long_watch(
    bench: LedgerFixture, done: tuple[RawOutcome, ...], statuses: list[str], together: bool
) -> None:
    """The first one counts, in one batch or in several."""
    bench.expose(SHOWN)
    found = bench.report(*done) if together else [status for one in done for status in bench.report(one)]
    assert found == statuses
    assert_same(statistics(bench.ledger), recomputed([SHOWN], done))


def test_watch_of_a_day_counts_twice_the_duration(bench: LedgerFixture) -> None:
    unknown = replace(SHOWN, id=12, viewer=2, duration_ms=0)
    bench.expose(SHOWN, unknown)
    day_ms = 24 * 3_600_000.0
    assert bench.report(*(RawOutcome(one, OutcomeType.WATCH, day_ms) for one in (SHOWN, unknown))) == ["counted"] * 2
    watched = statistics(bench.ledger)[Arm.CANARY, Slice.OVERALL]["watch_s_per_impression"]
    assert watched.sum_y == 0.5 * (2 * 20 + 60)
    assert bench.ledger.snapshot.bounded_watches == 2


def test_viewer_without_an_outcome_is_no_evidence(bench: LedgerFixture) -> None:
    """It is counted as silent until its first outcome."""
    bench.expose(SHOWN, replace(SHOWN, id=12, viewer=2))
    bench.report(LIKE)
    assert statistics(bench.ledger)[Arm.CANARY, Slice.OVERALL]["like_rate"].viewers == 1
    assert audience(bench)[Arm.CANARY] == {"viewers": 2, "all": 1.0, "silent": 0.5, "saturated": 0}


def test_viewer_with_the_same_outcome_on_everything_is_no_evidence(bench: LedgerFixture) -> None:
    shown = [replace(SHOWN, id=20 + i, viewer=viewer) for viewer in (1, 2) for i in range(10 * viewer, 10 * viewer + 8)]
    done = [RawOutcome(one, OutcomeType.WATCH, 20_000.0 if one.viewer == 1 or one.id % 2 else 0.0) for one in shown]
    bench.expose(*shown)
    bench.report(*done)
    assert_same(statistics(bench.ledger), recomputed(shown, done))
    assert statistics(bench.ledger)[Arm.CANARY, Slice.OVERALL]["long_watch_rate"].viewers == 1
    assert audience(bench)[Arm.CANARY]["saturated"] == 0.5


def test_viewer_that_watches_nothing_is_idle_evidence(bench: LedgerFixture) -> None:
    shown = [replace(SHOWN, id=20 + i) for i in range(5)]
    bench.expose(*shown)
    bench.report(*(RawOutcome(one, OutcomeType.WATCH, 0.0) for one in shown))
    counted = statistics(bench.ledger)[Arm.CANARY, Slice.OVERALL]["long_watch_rate"]
    assert (counted.viewers, counted.idle_x, counted.idle_xx) == (1, 2.5, 2.5**2)


def test_flood_of_one_viewer_counts_as_fifty_impressions(bench: LedgerFixture) -> None:
    shown = [replace(SHOWN, id=1_000 + i) for i in range(2_000)]
    bench.expose(*shown)
    bench.report(*(RawOutcome(one, OutcomeType.WATCH, 20_000.0) for one in shown[::2]))
    counted = statistics(bench.ledger)[Arm.CANARY, Slice.OVERALL]["long_watch_rate"]
    assert (counted.viewers, counted.impressions) == (1, MAX_IMPRESSIONS)
    assert (counted.sum_x, counted.sum_y) == (0.5 * MAX_IMPRESSIONS, 0.25 * MAX_IMPRESSIONS)


@pytest.mark.parametrize("together", [True, False])
def test_viewer_that_changes_its_arm_arrives_once(bench: LedgerFixture, together: bool) -> None:
    """A growing weight moves viewers from stable to the canary."""
    before, after = replace(SHOWN, id=12, arm=Arm.STABLE, weight=0.25), replace(SHOWN, id=13, weight=0.75)
    if together:
        bench.expose(before, after)
    else:
        bench.expose(before)
        bench.expose(after)
    found = audience(bench)
    assert (found[Arm.STABLE]["viewers"], found[Arm.CANARY]["viewers"]) == (1, 1)
    assert (found[Arm.STABLE]["all"], found[Arm.CANARY]["all"]) == (0.25, 0)


def audience(bench: LedgerFixture) -> dict[Arm, dict[str, float]]:
    """The number of viewers and the weight of each group, by arm."""
    found = {}
    for arm, values in bench.ledger.snapshot.audience.items():
        by_name = dict(zip(AUDIENCE_STATISTICS, values.tolist(), strict=True))
        groups = {group: by_name[group, "sum_w"] for group in AUDIENCE_GROUPS}
        found[arm.arm] = {"viewers": by_name["viewers"], **groups}
    return found


def test_outcome_without_a_rollout_is_outside(bench: LedgerFixture) -> None:
    nowhere = replace(SHOWN, rollout="", at=NOW - 10 * OUTCOME_HORIZON_S)
    assert bench.report(RawOutcome(nowhere, OutcomeType.LIKE), LIKE) == ["outside", "counted"]
    bench.expose(nowhere)
    assert [arm.rollout for arm in bench.ledger.snapshot.sums] == ["r-1"]


def test_exposures_do_not_restart_a_retired_rollout(bench: LedgerFixture) -> None:
    for number, name in enumerate(("r-1", "r-2", "r-3")):
        bench.now += 1
        bench.expose(replace(SHOWN, rollout=name, id=20 + number))
    for number in range(3):
        bench.now += OUTCOME_HORIZON_S
        bench.expose(replace(SHOWN, id=100 + number))
        bench.ledger.clean(bench.now, 100)
    assert {arm.rollout for arm in bench.ledger.snapshot.sums} == {"r-2", "r-3"}


def test_new_rollout_ends_the_one_with_the_oldest_exposure(bench: LedgerFixture) -> None:
    for number, name in enumerate(("r-1", "r-2")):
        bench.now += 1
        bench.expose(replace(SHOWN, rollout=name, id=20 + number))
    bench.now += 1
    bench.expose(replace(SHOWN, id=12))  # r-1 again, so that r-2 has the oldest exposure
    bench.now += 1
    bench.expose(replace(SHOWN, rollout="r-3", id=30))
    assert {arm.rollout for arm in bench.ledger.snapshot.sums} == {"r-1", "r-3"}
    assert bench.report(RawOutcome(replace(SHOWN, rollout="r-2"), OutcomeType.LIKE), LIKE) == ["retired", "counted"]
    bench.restart()
    assert bench.report(RawOutcome(replace(SHOWN, rollout="r-2"), OutcomeType.LIKE)) == ["retired"]


def test_rollout_that_ends_within_a_batch_loses_its_counts(bench: LedgerFixture) -> None:
    """The exposures of r-1 and the early outcome of r-3, which ends r-1, are read together."""
    shown = [replace(SHOWN, rollout=name, id=20 + number, at=NOW) for number, name in enumerate(("r-1", "r-2"))]
    early = RawOutcome(replace(SHOWN, rollout="r-3", id=30, at=NOW + 1), OutcomeType.LIKE)
    (statuses,) = bench.ledger.apply(exposures_of(shown), outcomes_of([early], NOW + 2), {})
    assert [RECEIVED_OUTCOMES[status] for status in statuses.tolist()] == ["counted"]
    assert {arm.rollout for arm in bench.ledger.snapshot.sums} == {"r-2", "r-3"}


def releases(count: int) -> list[ShownImpression]:
    """Returns an impression of each of many releases of the rollout r-1."""
    return [replace(SHOWN, id=1_000 + number, release=f"{number:064x}") for number in range(count)]


def test_new_arms_are_counted_after_a_thousand_rollouts(bench: LedgerFixture) -> None:
    """Nothing is cleaned meanwhile, as when a collector without a file reads a long log."""
    for number in range(MAX_ARMS + 10):
        bench.now += 1
        bench.expose(replace(SHOWN, rollout=f"r-{number}", id=1_000 + number))
    arms = bench.ledger.snapshot.sums
    assert [arm.rollout for arm in arms] == [f"r-{MAX_ARMS + 8}", f"r-{MAX_ARMS + 9}"]
    assert [float(seen[1]) for seen in bench.ledger.snapshot.audience.values()] == [1.0, 1.0]
    assert bench.rows("viewers") <= MAX_ARMS
    assert bench.ledger.snapshot.dropped_arms == 0
    bench.restart()
    assert bench.report(RawOutcome(replace(SHOWN, rollout="r-new", id=9, at=bench.now), OutcomeType.LIKE)) == [
        "counted"
    ]


@pytest.mark.parametrize("batch", [1, 50, MAX_LIVE_ARMS])
def test_too_many_arms_of_a_rollout_drop_the_oldest(bench: LedgerFixture, batch: int) -> None:
    shown = releases(MAX_LIVE_ARMS + 50)
    bench.expose(replace(SHOWN, rollout="r-0", id=1))  # ends first
    bench.now += 1
    for start in range(0, len(shown), batch):
        bench.expose(*shown[start : start + batch])
    arms = bench.ledger.snapshot.sums
    assert [arm.release for arm in arms] == [one.release for one in shown[50:]]
    assert bench.ledger.snapshot.dropped_arms == 51
    assert bench.report(RawOutcome(shown[-1], OutcomeType.LIKE)) == ["counted"]


def test_arms_without_a_number_are_not_counted(bench: LedgerFixture) -> None:
    """More new arms in one batch than numbers exist: the batch is applied, and the loss is reported."""
    bench.expose(*releases(MAX_ARMS + 5))
    assert len(bench.ledger.snapshot.sums) == MAX_LIVE_ARMS
    assert bench.ledger.snapshot.dropped_arms == MAX_ARMS + 5 - MAX_LIVE_ARMS
    bench.now += 1
    bench.expose(replace(SHOWN, rollout="r-2", id=2))
    assert "r-2" in {arm.rollout for arm in bench.ledger.snapshot.sums}


def test_token_of_a_dropped_rollout_drops_no_active_one(bench: LedgerFixture) -> None:
    for number, name in enumerate(("r-1", "r-2")):
        bench.expose(replace(SHOWN, rollout=name, id=20 + number))
    long_ago = replace(SHOWN, rollout="r-0", at=SHOWN.at - 60)
    assert bench.report(RawOutcome(long_ago, OutcomeType.LIKE)) == ["retired"]
    assert {arm.rollout for arm in bench.ledger.snapshot.sums} == {"r-1", "r-2"}


def test_early_outcome_registers_its_rollout(bench: LedgerFixture) -> None:
    for number, name in enumerate(("r-1", "r-2")):
        bench.now += 1
        bench.expose(replace(SHOWN, rollout=name, id=20 + number))
    newest = replace(SHOWN, rollout="r-3", at=bench.now)
    bench.now += 1
    assert bench.report(RawOutcome(newest, OutcomeType.LIKE)) == ["counted"]
    bench.expose(newest)
    assert {arm.rollout for arm in bench.ledger.snapshot.sums} == {"r-2", "r-3"}


def test_repeated_slate_is_counted_once(bench: LedgerFixture) -> None:
    other = replace(SHOWN, id=12)
    bench.ledger.apply([*exposures_of([SHOWN]), *exposures_of([SHOWN, other])], [], {})
    bench.restart()
    bench.ledger.apply(exposures_of([other, SHOWN], logged_at=NOW + 60), [], {})
    assert_same(statistics(bench.ledger), recomputed([SHOWN, other], []))


def test_slate_that_is_logged_too_late_is_not_counted(bench: LedgerFixture) -> None:
    """Its id may be forgotten, so a repeated slate could not be recognised."""
    late = replace(SHOWN, id=12)
    bench.ledger.apply(exposures_of([SHOWN], logged_at=NOW + EXPOSURE_HORIZON_S), [], {})
    bench.ledger.apply(exposures_of([late], logged_at=NOW + EXPOSURE_HORIZON_S + 1), [], {})
    assert_same(statistics(bench.ledger), recomputed([SHOWN], []))
    assert bench.ledger.snapshot.late_slates == 1


def test_slates_are_remembered_until_they_would_be_late(bench: LedgerFixture) -> None:
    bench.expose(SHOWN)
    bench.now += EXPOSURE_HORIZON_S
    bench.ledger.clean(bench.now, 100)
    bench.ledger.apply(exposures_of([SHOWN], logged_at=bench.now), [], {})
    assert_same(statistics(bench.ledger), recomputed([SHOWN], []))


def test_position_is_stored_with_the_counts(bench: LedgerFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.ledger.apply(exposures_of([SHOWN]), [], {"exposures": {0: 2, 3: 9}})
    with monkeypatch.context() as broken:
        broken.setattr(bench.store, "write_sums", _no_space)
        with pytest.raises(OSError, match="no space"):
            bench.ledger.apply(exposures_of([replace(SHOWN, id=12)]), [], {"exposures": {0: 3, 3: 9}})
    bench.restart()
    assert bench.ledger.position("exposures") == {0: 2, 3: 9}
    assert bench.ledger.position("outcomes") == {}
    assert_same(statistics(bench.ledger), recomputed([SHOWN], []))


def _no_space(*_: object) -> None:
    raise OSError("no space left on device")


def test_outcome_of_an_unknown_type_is_left_out() -> None:
    (outcome,) = columns_from_newer_writer()
    assert outcome.kind.tolist() == [OUTCOME_TYPES.index(OutcomeType.LIKE)]


def columns_from_newer_writer() -> list[OutcomeRows]:
    """Reads a record in which one of two outcomes has a type that this version does not know."""
    table = decode_outcomes(outcome_record([LIKE, RawOutcome(SHOWN, OutcomeType.SAVE)]).payload)
    types = pa.array(["like", "duet"]).dictionary_encode().cast(STRING_DICTIONARY_TYPE)
    newer = table.set_column(table.schema.get_field_index("type"), table.schema.field("type"), types)
    payload = encode_rows(newer.combine_chunks().to_batches()[0])
    return [read_outcome_rows(StoredRecord(0, 1, int(NOW * 1e6), payload))]


def test_arm_with_another_release_has_separate_sums(bench: LedgerFixture) -> None:
    bench.expose(SHOWN)
    promoted = ArmKey("r-1", Arm.CANARY, "ef" * 32)
    (rows,) = exposures_of([replace(SHOWN, id=12)])
    bench.ledger.apply([replace(rows, arms=(promoted,))], [], {})
    seen = bench.ledger.snapshot.audience
    assert seen[promoted][0] == seen[SHOWN.exposed_arm][0] == 1


def test_outcome_may_arrive_before_its_impression(bench: LedgerFixture) -> None:
    assert bench.report(LIKE) == ["counted"]
    bench.expose(SHOWN)
    assert_same(statistics(bench.ledger), recomputed([SHOWN], [LIKE]))


@pytest.mark.parametrize(
    ("watched_ms", "duration_ms", "long"),
    [
        (13_999, 20_000, 0), (14_000, 20_000, 1), (29_999, 600_000, 0), (30_000, 600_000, 1),
        (29_999, 0, 0), (30_000, 0, 1), (0, 20_000, 0),
    ],
)  # fmt: skip
def test_long_watch_is_defined_by_ratio_or_cap(
    bench: LedgerFixture, watched_ms: int, duration_ms: int, long: int
) -> None:
    bench.expose(SHOWN)
    bench.report(RawOutcome(replace(SHOWN, duration_ms=duration_ms), OutcomeType.WATCH, watched_ms))
    overall = statistics(bench.ledger)[Arm.CANARY, Slice.OVERALL]
    assert overall["long_watch_rate"].sum_y == 0.5 * long
    assert overall["watch_s_per_impression"].sum_y == pytest.approx(0.5 * watched_ms / 1000)


def test_cleanup_deletes_only_expired_rows(bench: LedgerFixture) -> None:
    bench.expose(SHOWN)
    bench.report(LIKE)
    bench.now += OUTCOME_HORIZON_S
    assert bench.ledger.clean(bench.now, 100) == 1, "the slate, whose repetition would be late"
    assert (bench.rows("seen"), bench.rows("slates")) == (1, 0)
    fresh = replace(SHOWN, id=12, at=bench.now)
    bench.report(RawOutcome(fresh, OutcomeType.LIKE))
    bench.now += 3 * 3600
    assert bench.ledger.clean(bench.now, 100) == 1
    assert (bench.rows("seen"), bench.rows("slates"), bench.rows("viewers")) == (1, 0, 1)
    assert bench.report(LIKE, RawOutcome(fresh, OutcomeType.LIKE)) == ["late", "duplicate"]


def test_dropped_rollout_is_deleted_in_batches(bench: LedgerFixture) -> None:
    for number, rollout in enumerate(("r-1", "r-2", "r-3")):
        bench.now += 1
        ids = range(100 * number, 100 * number + 30)
        bench.expose(*(ShownImpression(i, i % 100, Arm.STABLE, 0.5, 0, rollout=rollout) for i in ids))
    assert bench.rows("viewers") == 90
    left = [bench.ledger.clean(bench.now, 20) for _ in range(3)]
    assert left == [20, 10, 0]
    assert bench.rows("viewers") == 60
    assert bench.rows("arms") == 2
    bench.now += 2 * OUTCOME_HORIZON_S
    bench.ledger.clean(bench.now, 20)
    assert bench.rows("rollouts") == 2


def test_failed_batch_counts_nothing(bench: LedgerFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.expose(SHOWN)
    before = bench.ledger.snapshot
    sums = before.sums[SHOWN.exposed_arm].copy()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(bench.store, "write_sums", full)
        with pytest.raises(OSError, match="no space"):
            bench.report(LIKE)
    assert bench.ledger.snapshot is before
    assert (before.sums[SHOWN.exposed_arm] == sums).all()
    assert bench.report(LIKE) == ["counted"]
    assert_same(statistics(bench.ledger), recomputed([SHOWN], [LIKE]))


def test_rows_of_one_viewer_in_a_batch_are_one_viewer(bench: LedgerFixture) -> None:
    many: Callable[[int], ShownImpression] = lambda i: replace(SHOWN, id=i, slices=i % 8)
    shown = [many(i) for i in range(16)]
    done = [RawOutcome(one, OutcomeType.LIKE) for one in shown[:3]]
    bench.expose(*shown)
    bench.report(*done)
    assert statistics(bench.ledger)[Arm.CANARY, Slice.OVERALL]["like_rate"].viewers == 1
    assert_same(statistics(bench.ledger), recomputed(shown, done))


def test_required_identity_excludes_other_viewers(bench: LedgerFixture) -> None:
    """Neither their slates nor their outcomes are evidence; both are counted."""
    bench.require_authenticated = True
    bench.restart()
    proven = replace(SHOWN, id=12, viewer=2, authenticated=True)
    bench.expose(SHOWN, proven)
    (forged,) = outcomes_of([LIKE])
    (honest,) = outcomes_of([RawOutcome(proven, OutcomeType.LIKE)])
    honest = replace(honest, authenticated=np.array([True]))
    statuses = bench.ledger.apply([], [forged, honest], {})
    assert [RECEIVED_OUTCOMES[int(status[0])] for status in statuses] == ["unauthenticated", "counted"]
    assert_same(statistics(bench.ledger), recomputed([proven], [RawOutcome(proven, OutcomeType.LIKE)]))
    assert bench.ledger.snapshot.unauthenticated_slates == 1
