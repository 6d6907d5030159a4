"""Folders of parts, repeated columns, byte order marks and hidden files are read, or rejected by name."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from tests.support.pipelines import published_formats as formats
from typer.testing import CliRunner

from reelway.pipelines.commands import import_dataset
from reelway.pipelines.datasets.event_files import import_events
from reelway.pipelines.datasets.movielens import files_of, import_movielens
from reelway.pipelines.datasets.store import read_dataset
from reelway.platform.errors import DataError, EmptyDatasetError, MalformedFileError

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
AT = 1_738_324_800


def spark_folder(path: Path, *ids: pa.Array, **columns: pa.Array) -> Path:
    path.mkdir()
    for i, part in enumerate(ids):
        table = {"viewer_id": part, "video_id": [7] * len(part), "event_time": [AT + i] * len(part), **columns}
        pq.write_table(pa.table(table), path / f"part-{i:05d}-c000.snappy.parquet")
    (path / "_SUCCESS").touch()
    (path / ".part-00000-c000.snappy.parquet.crc").write_bytes(b"crc")
    (path / "._part-00000-c000.snappy.parquet").write_bytes(APPLE_DOUBLE)
    return path


def viewers_of(path: Path) -> list[int]:
    viewers: list[int] = import_events(path)[0]["impressions"]["viewer_id"].to_pylist()
    return viewers


def test_spark_folder_is_read(tmp_path: Path) -> None:
    assert viewers_of(spark_folder(tmp_path / "shown.parquet", pa.array([5, 6]), pa.array([7]))) == [5, 6, 7]


def test_folder_of_csv_parts_is_read_with_its_own_rows(tmp_path: Path) -> None:
    for i, line in enumerate(("01,7,2025-01-31,3", "1,7,2025-01-31,3.5", "2,7,noon,3")):
        (tmp_path / f"part-{i}.csv").write_text(f"viewer_id,video_id,event_time,watch_ms\n{line}\n")
    with pytest.raises(MalformedFileError, match=r"part-2\.csv, row 2, column 'event_time': saw 'noon'"):
        import_events(tmp_path)
    (tmp_path / "part-2.csv").unlink()
    assert viewers_of(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (pa.array([2**53 + 1]), pa.array([1.0]), r"part-00001.*column 'viewer_id': saw 'double', expected type int64"),
        (pa.array(["1"]), pa.array([1]), r"part-00001.*column 'viewer_id': saw 'int64', expected type string"),
        (pa.array([2**63], pa.uint64()), pa.array([1]), r"part-00001.*column 'viewer_id': saw 'int64'"),
    ],
)
def test_parts_of_other_types_are_rejected(tmp_path: Path, first: pa.Array, second: pa.Array, message: str) -> None:
    with pytest.raises(MalformedFileError, match=message):
        import_events(spark_folder(tmp_path / "shown.parquet", first, second))


def test_parts_with_other_columns_are_rejected(tmp_path: Path) -> None:
    folder = spark_folder(tmp_path / "shown.parquet", pa.array([1]))
    pq.write_table(pa.table({"viewer_id": [1], "video_id": [7]}), folder / "part-00001.parquet")
    with pytest.raises(MalformedFileError, match=r"part-00001.*column 'event_time'.*same columns in every part"):
        import_events(folder)


def test_partitioned_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "shown.parquet").mkdir()
    spark_folder(tmp_path / "shown.parquet" / "day=2025-01-31", pa.array([1]))
    with pytest.raises(MalformedFileError, match=r"saw 'day=2025-01-31', expected .* without subfolders"):
        import_events(tmp_path / "shown.parquet")


@pytest.mark.parametrize("names", [(), ("readme.md",), ("a.csv", "b.parquet")])
def test_folder_of_other_files_is_rejected(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(MalformedFileError, match="expected a folder of parts of one kind"):
        import_events(tmp_path)


def test_column_twice_is_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("viewer_id,video_id,viewer_id,event_time\n1,7,2,2025-01-31\n")
    table = pa.table([[1], [7], [2], [AT]], names=["viewer_id", "video_id", "viewer_id", "event_time"])
    pq.write_table(table, tmp_path / "e.parquet")
    for name in ("e.csv", "e.parquet"):
        with pytest.raises(MalformedFileError, match=r"column 'viewer_id': .*expected this column once"):
            import_events(tmp_path / name)
    ratings = formats.ml_25m(tmp_path / "ml") / "ratings.csv"
    ratings.write_text("userId,movieId,rating,timestamp,userId\n1,10,5,880000000,2\n")
    with pytest.raises(MalformedFileError, match=r"row 1, column 'userId': .*expected this column once"):
        import_movielens(tmp_path / "ml")


def test_columns_that_are_not_used_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("note,viewer_id,video_id,event_time,note\na,1,7,2025-01-31,b\n")
    assert viewers_of(tmp_path / "e.csv") == [1]


def test_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("viewer_id,video_id,event_time\n1,7,2025-01-31\n", encoding="utf-8-sig")
    assert viewers_of(tmp_path / "e.csv") == [1]
    for make, name in ((formats.ml_100k, "u.data"), (formats.ml_25m, "ratings.csv"), (formats.recbole, "ml.inter")):
        path = make(tmp_path / name) / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert import_movielens(tmp_path / name)[0]["impressions"].num_rows == len(formats.RATINGS)


@pytest.mark.parametrize("content", [b"", b"\n\n", "viewer_id,video_id\n1,2\n".encode("utf-16")])
def test_files_that_are_no_csv_are_input_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"e\.csv"):
        import_events(tmp_path / "e.csv")


def test_parts_without_rows_are_an_empty_data_set(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match="0 rows"):
        import_events(spark_folder(tmp_path / "shown.parquet", pa.array([], pa.int64()), pa.array([], pa.int64())))


def test_hidden_files_beside_published_data_are_ignored(tmp_path: Path) -> None:
    for make in (formats.recbole, formats.kuairand):
        folder = make(tmp_path / make.__name__)
        for file in list(folder.iterdir()):
            (folder / f"._{file.name}").write_bytes(APPLE_DOUBLE)
    assert [file.name for file in files_of(tmp_path / "recbole")] == ["ml.inter", "ml.item", "ml.user"]
    for command, folder in (("movielens", "recbole"), ("kuairand", "kuairand")):
        result = reelway(command, tmp_path / folder, tmp_path / "run")
        assert result.exit_code == 0, result.output


def test_several_parts_of_recbole_are_rejected_by_name(tmp_path: Path) -> None:
    folder = formats.recbole(tmp_path)
    (folder / "ml.inter").rename(folder / "ml.part1.inter")
    (folder / "ml.part2.inter").write_bytes((folder / "ml.part1.inter").read_bytes())
    with pytest.raises(MalformedFileError, match=r"\['ml\.part1\.inter', 'ml\.part2\.inter'\], expected one \*\.inter"):
        import_movielens(folder)


def test_command_reads_a_folder_and_notices_a_changed_part(tmp_path: Path) -> None:
    folder = spark_folder(tmp_path / "shown.parquet", pa.array([5, 6]), pa.array([7]))
    run = tmp_path / "run"
    assert reelway("events", folder, run).exit_code == 0
    assert "already" in reelway("events", folder, run).output
    (folder / "part-00001-c000.snappy.parquet").unlink()
    assert "already" not in reelway("events", folder, run).output
    assert read_dataset(run / "dataset").impressions.num_rows == 2


def reelway(command: str, source: Path, run: Path):  # type: ignore[no-untyped-def]
    app = typer.Typer()
    import_dataset.register(app)
    return CliRunner().invoke(app, ["import", command, str(source), "--run", str(run)])
