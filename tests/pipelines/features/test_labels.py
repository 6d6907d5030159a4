"""Labels of impressions from their outcomes."""

from __future__ import annotations

import pytest
from tests.support.pipelines.event_tables import DAY_US, START_US, impressions, outcomes, videos

from reelway.pipelines.features.labels import BINARY_OUTCOMES, LABELLED_SCHEMA, LABELS, label_impressions
from reelway.platform.errors import DataError


def label(outcome_rows: list, *, duration_ms: int = 20_000) -> dict:
    table = label_impressions(
        impressions([(1, 5, 9, START_US)]), outcomes(outcome_rows), videos([9], duration_ms=duration_ms)
    )
    assert table.schema.equals(LABELLED_SCHEMA)
    return table.to_pylist()[0]


def test_impression_without_outcomes_is_a_row_of_zeros() -> None:
    row = label([])
    assert {name: row[name] for name in LABELS} == dict.fromkeys(LABELS, 0.0)
    assert row["weight"] == 0.0
    assert row["outcome_time"] == row["event_time"]


@pytest.mark.parametrize("kind", BINARY_OUTCOMES)
def test_outcome_sets_only_its_own_label(kind: str) -> None:
    row = label([(1, kind, 1.0, START_US + 1)])
    assert {name for name in LABELS if row[name]} == {kind}


@pytest.mark.parametrize(
    ("watch_ms", "duration_ms", "expected"),
    [(13_999, 20_000, 0.0), (14_000, 20_000, 1.0), (29_999, 600_000, 0.0), (30_000, 600_000, 1.0)],
)
def test_long_watch_is_seventy_percent_of_the_video_or_thirty_seconds(watch_ms, duration_ms, expected) -> None:
    row = label([(1, "watch", watch_ms, START_US + 1)], duration_ms=duration_ms)
    assert row["long_watch"] == expected
    assert row["watch_s"] == pytest.approx(watch_ms / 1000)


def test_repeated_outcome_changes_nothing() -> None:
    once = [(1, "watch", 15_000, START_US + 9), (1, "like", 1.0, START_US + 10)]
    assert label(once) == label(once + once)


def test_outcome_after_the_horizon_does_not_count() -> None:
    at_limit, late = START_US + DAY_US, START_US + DAY_US + 1
    assert label([(1, "like", 1.0, at_limit)])["like"] == 1.0
    row = label([(1, "like", 1.0, late)])
    assert row["like"] == 0.0
    assert row["outcome_time"] == row["event_time"]


def test_weight_is_the_clipped_sum_of_outcome_weights() -> None:
    assert label([(1, "like", 1.0, START_US), (1, "skip", 1.0, START_US)])["weight"] == pytest.approx(0.5)
    everything = [(1, kind, 1.0, START_US) for kind in ("like", "share", "save", "follow", "comment")]
    assert label([*everything, (1, "watch", 60_000, START_US)])["weight"] == 5.0
    assert label([(1, "report", 1.0, START_US), (1, "not_interested", 1.0, START_US)])["weight"] == -3.0


def test_impression_counts_from_its_last_outcome() -> None:
    row = label([(1, "like", 1.0, START_US + 7_000_000), (1, "watch", 900, START_US + 2_000_000)])
    assert (row["outcome_time"] - row["event_time"]).total_seconds() == 7.0


def test_request_time_is_the_time_of_its_first_impression() -> None:
    shown = impressions([(1, 5, 9, START_US + 40), (2, 5, 9, START_US), (3, 5, 9, START_US + 90)], request=[4, 4, 5])
    rows = label_impressions(shown, outcomes([]), videos([9]))
    microseconds = rows["request_time"].cast("int64").to_pylist()
    assert microseconds == [START_US, START_US, START_US + 90]


def test_outcomes_of_other_impressions_do_not_change_labels() -> None:
    shown = impressions([(1, 5, 9, START_US), (2, 6, 9, START_US)])
    rows = label_impressions(shown, outcomes([(2, "like", 1.0, START_US), (77, "like", 1.0, START_US)]), videos([9]))
    assert rows["like"].to_pylist() == [0.0, 1.0]


def test_impression_of_an_unknown_video_is_rejected() -> None:
    with pytest.raises(DataError, match="first: 404"):
        label_impressions(impressions([(1, 5, 404, START_US)]), outcomes([]), videos([9]))


def test_empty_events_give_an_empty_table_with_the_same_schema() -> None:
    table = label_impressions(impressions([]), outcomes([]), videos([9]))
    assert table.num_rows == 0
    assert table.schema.equals(LABELLED_SCHEMA)
