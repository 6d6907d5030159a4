"""Incremental sums equal those of all events at once: in any order, repeated, across restarts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.serving.raw_events import (
    NOW,
    RawOutcome,
    ShownImpression,
    assert_same,
    exposures_of,
    outcomes_of,
    recomputed,
    statistics,
)

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.rollout.metric_names import AUDIENCE_COUNTS
from reelway.serving.outcomes.ledger import Ledger
from reelway.serving.outcomes.outcome_store import OutcomeStore

SHOWN = st.lists(
    st.builds(
        ShownImpression,
        id=st.integers(0, 2**53 - 1),
        viewer=st.sampled_from([0, 1, 2, 3, 2**53 - 1]),
        arm=st.sampled_from([Arm.STABLE, Arm.CANARY, Arm.HOLDOUT]),
        weight=st.sampled_from([0.0, 0.009999999776482582, 0.5, 0.75, 0.9900000095367432, 1.0]),  # as float32
        slices=st.integers(0, 7),
        duration_ms=st.sampled_from([1_000, 20_000, 200_000]),
        at=st.sampled_from([NOW, NOW - 3_600, NOW - 80_000]),
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda one: one.id,
)


WATCHED_MS = [0.0, 700.0, 14_000.0, 30_000.0, 86_400_000.0]


def _done(shown: ShownImpression, kind: OutcomeType, watched_ms: float) -> RawOutcome:
    return RawOutcome(shown, kind, watched_ms if kind is OutcomeType.WATCH else 1.0)


@settings(max_examples=60, deadline=None)
@given(SHOWN, st.data())
def test_incremental_sums_equal_the_sums_of_all_events(shown: list[ShownImpression], data: st.DataObject) -> None:
    done = data.draw(
        st.lists(
            st.builds(_done, st.sampled_from(shown), st.sampled_from(list(OutcomeType)), st.sampled_from(WATCHED_MS)),
            max_size=30,
        )
    )
    done = done + data.draw(st.lists(st.sampled_from(done), max_size=10) if done else st.just([]))
    steps = data.draw(st.permutations([*shown, *done]))
    with tempfile.TemporaryDirectory() as folder:
        path, counted = Path(folder) / "outcomes.db", list[RawOutcome]()
        store = OutcomeStore(path)
        ledger = Ledger(store, keep_rollouts=2)
        while steps:
            size = data.draw(st.integers(1, 12))
            now, steps = steps[:size], steps[size:]
            rows = exposures_of([one for one in now if isinstance(one, ShownImpression)])
            outcomes = [one for one in now if isinstance(one, RawOutcome)]
            counted += outcomes
            ledger.apply([*rows, *rows], [*outcomes_of(outcomes[:3]), *outcomes_of(outcomes[3:])], {})
            if data.draw(st.booleans()):
                store.close()
                store = OutcomeStore(path)
                ledger = Ledger(store, keep_rollouts=2)
        actual = statistics(ledger)
        store.close()
    assert_same(actual, recomputed(shown, counted))


@settings(max_examples=25, deadline=None)
@given(SHOWN, st.data())
def test_audience_counts_never_decrease(shown: list[ShownImpression], data: st.DataObject) -> None:
    """A decrease tells the rollout that the collector lost data."""
    with tempfile.TemporaryDirectory() as folder:
        path, before = Path(folder) / "outcomes.db", {}
        for one in shown:
            store = OutcomeStore(path)
            ledger = Ledger(store, keep_rollouts=2)
            kind = data.draw(st.sampled_from([OutcomeType.WATCH, OutcomeType.LIKE]))
            ledger.apply(exposures_of([one]), outcomes_of([RawOutcome(one, kind, 1.0)]), {})
            after = {arm: seen[: len(AUDIENCE_COUNTS)].copy() for arm, seen in ledger.snapshot.audience.items()}
            for arm, counts in before.items():
                assert (after[arm] >= counts).all()
            before = after
            store.close()


@settings(max_examples=20, deadline=None)
@given(
    viewers=st.lists(
        st.tuples(st.integers(1, 120), st.floats(0, 1), st.sampled_from([0.25, 0.9900000095367432])), max_size=4
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_bounded_sums_equal_those_of_all_events(viewers: list[tuple[int, float, float]], seed: int) -> None:
    """Floods, saturated and silent viewers included, in batches of any size: a viewer enters, leaves and is scaled."""
    rng = np.random.default_rng(seed)
    shown = [
        ShownImpression(1_000 * viewer + i, viewer, Arm.CANARY, weight, int(rng.integers(8)))
        for viewer, (count, _, weight) in enumerate(viewers)
        for i in range(count)
    ]
    done = [
        RawOutcome(one, OutcomeType.WATCH, float(rng.choice([900.0, 20_000.0, 86_400_000.0])))
        for one in shown
        if rng.random() < viewers[one.viewer][1]
    ]
    events = [*shown, *done]
    order = rng.permutation(len(events)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        store = OutcomeStore(Path(folder) / "outcomes.db")
        ledger = Ledger(store, keep_rollouts=2)
        while order:
            batch, order = [events[i] for i in order[:97]], order[97:]
            ledger.apply(
                exposures_of([one for one in batch if isinstance(one, ShownImpression)]),
                outcomes_of([one for one in batch if isinstance(one, RawOutcome)]),
                {},
            )
        actual = statistics(ledger)
        store.close()
    assert_same(actual, recomputed(shown, done))
