"""The video table: equality with the feature assembly, immutable versions, and validation of its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.dimensions import DIMENSIONS
from tests.support.release_files import NOW_S, make_release_folder, write_arrow

from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.manifest import VIDEOS_FILE
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.features.assembly import assemble_videos
from reelway.serving.table_columns import index_in_sorted
from reelway.serving.video_table import ABSENT, VideoTable, open_record_batch, open_video_table

VIDEOS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release")
    make_release_folder(path, videos=VIDEOS)
    return path


@pytest.fixture
def table(folder: Path) -> VideoTable:
    return open_video_table(folder / VIDEOS_FILE)


def test_unknown_ids_are_absent(table: VideoTable) -> None:
    requested = np.concatenate([table.video_id[::-1], [-5, 0, int(table.video_id[-1]) + 1]])
    assert table.rows_of(requested).tolist() == [*range(VIDEOS - 1, -1, -1), ABSENT, ABSENT, ABSENT]


def test_gather_equals_the_feature_assembly(table: VideoTable, folder: Path) -> None:
    rows = np.array([5, 3, 3, 59], dtype=np.int32)
    table_rows = pa.Table.from_batches([open_record_batch(folder / VIDEOS_FILE)]).take(rows)
    static = np.stack(table_rows["static_dense"].to_numpy())
    live = np.stack(table_rows["live_dense"].to_numpy())
    columns = {
        "video_id": table_rows["video_id"].to_numpy(),
        "creator_id": table_rows["creator_id"].to_numpy(),
        "topic": table_rows["topic"].to_numpy(),
        "uploaded_at_s": table_rows["uploaded_at_s"].to_numpy(),
        "duration_s": static[:, 0],
        **{name: live[:, i] for i, name in enumerate(names.VIDEO_LIVE_DENSE)},
    }
    expected = assemble_videos(columns, np.full(len(rows), NOW_S), DIMENSIONS)
    gathered = table.gather(rows, NOW_S)

    has = [names.VIDEO_DENSE.index(name) for name in names.VIDEO_STATIC_DENSE[1:]]
    np.testing.assert_array_equal(np.delete(gathered.video_dense, has, 1), np.delete(expected.video_dense, has, 1))
    np.testing.assert_array_equal(gathered.video_dense[:, has], static[:, 1:])
    np.testing.assert_array_equal(gathered.creator_codes, expected.creator_codes)
    np.testing.assert_array_equal(gathered.video_categories[:, 0], expected.video_categories[:, 0])
    np.testing.assert_array_equal(gathered.video_embedding, table.embedding[rows])


def test_columns_are_memory_mapped(table: VideoTable) -> None:
    for column in (table.video_id.base, table.embedding.base, table.live.snapshot.base):
        assert not column.flags.owndata
        assert not column.flags.writeable


def test_overlay_does_not_change_earlier_versions(table: VideoTable) -> None:
    rows = np.array([7, 8], dtype=np.int32)
    before = table.live
    copy = before.at(rows)
    fresher = np.full((2, len(names.VIDEO_LIVE_DENSE)), 42.0, dtype=np.float32)

    assert table.overlay(rows, fresher) == 1
    live = slice(len(names.VIDEO_STATIC_DENSE), -1)
    assert (table.gather(rows, NOW_S).video_dense[:, live] == 42.0).all()
    np.testing.assert_array_equal(before.at(rows), copy)
    unchanged = np.array([0, 6, 9], dtype=np.int32)
    np.testing.assert_array_equal(table.live.at(unchanged), before.at(unchanged))
    assert table.live.version == 1
    with pytest.raises(ValueError, match="read-only"):
        table.live.fresh[0, 0] = 1.0


@given(st.lists(st.lists(st.tuples(st.integers(0, VIDEOS - 1), st.floats(0, 9, width=32)), max_size=8), max_size=5))
@settings(max_examples=50)
def test_repeated_overlays_equal_writes_to_a_matrix(folder: Path, batches: list[list[tuple[int, float]]]) -> None:
    table = open_video_table(folder / VIDEOS_FILE)
    every = np.arange(VIDEOS, dtype=np.int32)
    expected = table.live.at(every)
    for batch in batches:
        rows = np.array([row for row, _ in batch], dtype=np.int32)
        values = np.array([[value] * expected.shape[1] for _, value in batch], np.float32).reshape(
            -1, expected.shape[1]
        )
        expected[rows] = values
        table.overlay(rows, values)
    np.testing.assert_array_equal(table.live.at(every), expected)
    assert table.live.snapshot.base is not None  # never copied


@pytest.mark.parametrize(
    ("rows", "width", "reason"), [([0], 3, "shape"), ([-1], None, "span -1"), ([VIDEOS], None, "expected 0..59")]
)
def test_invalid_overlay_changes_nothing(table: VideoTable, rows: list[int], width: int | None, reason: str) -> None:
    values = np.zeros((len(rows), width or len(names.VIDEO_LIVE_DENSE)), dtype=np.float32)
    with pytest.raises(ValueError, match=reason):
        table.overlay(np.array(rows, dtype=np.int32), values)
    assert table.live.version == 0


@given(st.sets(st.integers(0, 1000), max_size=50), st.lists(st.integers(-5, 1005), max_size=50))
@settings(max_examples=50)
def test_index_in_sorted_matches_a_dictionary_lookup(present: set[int], requested: list[int]) -> None:
    ids = np.array(sorted(present), dtype=np.int64)
    expected = [ids.tolist().index(one) if one in present else -1 for one in requested]
    assert index_in_sorted(ids, np.array(requested, dtype=np.int64)).tolist() == expected


def test_file_with_other_columns_raises(folder: Path, tmp_path: Path) -> None:
    complete = pa.Table.from_batches([open_record_batch(folder / VIDEOS_FILE)])
    write_arrow(tmp_path / "videos.arrow", complete.drop_columns(["topic"]))
    with pytest.raises(IncompatibleReleaseError, match="expected"):
        open_video_table(tmp_path / "videos.arrow")


def test_unordered_ids_raise_with_their_row(folder: Path, tmp_path: Path) -> None:
    complete = pa.Table.from_batches([open_record_batch(folder / VIDEOS_FILE)])
    write_arrow(tmp_path / "videos.arrow", complete.take([0, 2, 1]))
    with pytest.raises(IncompatibleReleaseError, match="row 2"):
        open_video_table(tmp_path / "videos.arrow")


def test_file_that_is_not_arrow_raises(tmp_path: Path) -> None:
    (tmp_path / "videos.arrow").write_bytes(b"not arrow")
    with pytest.raises(IncompatibleReleaseError, match="cannot be read"):
        open_video_table(tmp_path / "videos.arrow")
