import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from click.testing import Result
from tests.support.pipelines import published_formats as formats
from typer.testing import CliRunner

from reelway.pipelines.commands import import_dataset, simulate
from reelway.pipelines.datasets.store import read_dataset
from reelway.platform.errors import MalformedFileError, TooManyBadRowsError
from reelway.platform.run_directory import RunDirectory

SMALL = ["--viewers", "150", "--videos", "200", "--days", "3", "--impressions", "3000"]


def reelway(*arguments: object) -> Result:
    app = typer.Typer()
    simulate.register(app)
    import_dataset.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_simulate_writes_a_checked_data_set(tmp_path: Path) -> None:
    result = reelway("simulate", "--run", tmp_path, *SMALL, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert "3,000" in result.output
    dataset = read_dataset(RunDirectory(tmp_path).dataset)
    assert dataset.impressions.num_rows == 3000
    assert dataset.info["seed"] == 5
    record = RunDirectory(tmp_path).record("dataset")
    assert record["config"]["kind"] == "simulated"
    assert record["summary"]["rows"]["impressions"] == 3000
    assert pq.read_table(tmp_path / "dataset" / "rejected.parquet").num_rows == 0


def test_simulate_is_skipped_unless_forced_or_changed(tmp_path: Path) -> None:
    reelway("simulate", "--run", tmp_path, *SMALL)
    written = (tmp_path / "dataset" / "dataset.json").stat().st_mtime_ns
    assert "already" in reelway("simulate", "--run", tmp_path, *SMALL).output
    assert (tmp_path / "dataset" / "dataset.json").stat().st_mtime_ns == written
    assert "already" not in reelway("simulate", "--run", tmp_path, *SMALL, "--force").output
    assert "already" not in reelway("simulate", "--run", tmp_path, *SMALL, "--seed", 1).output
    assert read_dataset(tmp_path / "dataset").info["seed"] == 1


@pytest.mark.parametrize(
    ("command", "make"),
    [("ml-100k", formats.recbole), ("movielens", formats.ml_25m), ("kuairand", formats.kuairand)],
)
def test_import_reads_published_data(tmp_path: Path, command: str, make) -> None:  # type: ignore[no-untyped-def]
    source, run = make(tmp_path / "source"), tmp_path / "run"
    result = reelway("import", command, source, "--run", run)
    assert result.exit_code == 0, result.output
    assert read_dataset(run / "dataset").impressions.num_rows >= 3
    assert "already" in reelway("import", command, source, "--run", run).output


def test_import_reads_a_changed_file_again(tmp_path: Path) -> None:
    source = formats.ml_25m(tmp_path / "source")
    reelway("import", "movielens", source, "--run", tmp_path / "run")
    with (source / "ratings.csv").open("a") as file:
        file.write("4,30,2.0,880086500\n")
    assert "already" not in reelway("import", "movielens", source, "--run", tmp_path / "run").output
    assert read_dataset(tmp_path / "run" / "dataset").impressions.num_rows == 9


def test_import_events_writes_id_map(tmp_path: Path) -> None:
    rows = [f"viewer{i},video{i % 3},2025-01-31T12:00:{i:02d}Z,1.0" for i in range(40)]
    rows[7] = rows[7].replace("1.0", "3.0")
    (tmp_path / "e.csv").write_text("\n".join(["viewer_id,video_id,event_time,propensity", *rows, ""]))
    result = reelway("import", "events", tmp_path / "e.csv", "--run", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "propensity_out_of_range" in result.output
    folder = tmp_path / "run" / "dataset"
    assert pq.read_table(folder / "id_map.parquet").num_rows == 43
    rejected = pq.read_table(folder / "rejected.parquet").to_pylist()
    assert [(r["table"], r["reason"]) for r in rejected] == [("impressions", "propensity_out_of_range")]
    assert json.loads(rejected[0]["row"])["propensity"] == 3.0
    assert read_dataset(folder).impressions.num_rows == 39


def test_too_many_bad_rows_leave_no_data_set(tmp_path: Path) -> None:
    rows = [f"{i},1,2025-01-31T12:00:{i:02d}Z,{3.0 if i < 10 else 1.0}" for i in range(40)]
    (tmp_path / "e.csv").write_text("\n".join(["viewer_id,video_id,event_time,propensity", *rows, ""]))
    result = reelway("import", "events", tmp_path / "e.csv", "--run", tmp_path / "run")
    assert isinstance(result.exception, TooManyBadRowsError)
    assert not (tmp_path / "run" / "dataset").exists()
    assert not RunDirectory(tmp_path / "run").record_path("dataset").exists()
    again = reelway("import", "events", tmp_path / "e.csv", "--run", tmp_path / "run", "--max-bad-ratio", "0.3")
    assert again.exit_code == 0, again.output


def test_import_rejects_a_missing_source(tmp_path: Path) -> None:
    for arguments in (
        ("movielens", tmp_path / "none"),
        ("kuairand", tmp_path / "none"),
        ("events", tmp_path / "none.csv"),
    ):
        assert isinstance(reelway("import", *arguments, "--run", tmp_path / "run").exception, MalformedFileError)
