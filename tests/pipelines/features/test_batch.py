"""The Ray Data batch job and the ``reelway features`` command, end to end on a small data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import typer
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset, write_dataset
from typer.testing import CliRunner

from reelway.pipelines.commands import features as command
from reelway.pipelines.features.batch import BatchSettings, build_views, partition_of
from reelway.pipelines.features.materialisation import materialised_at_s
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.contracts.feature_names import VIEWS
from reelway.platform.errors import EmptyDatasetError, ParityError
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

SETTINGS = ViewSettings(DIMENSIONS)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def runtime() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, namespace="features", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    write_dataset(run.dataset, random_dataset())
    run.record_path("dataset").parent.mkdir(parents=True)
    run.record_path("dataset").write_text(json.dumps({"identity": "made by a test", "summary": {}}))
    return run


def rows_of(table: pa.Table) -> pa.Table:
    return table.sort_by([(table.column_names[0], "ascending"), ("event_timestamp", "ascending")])


def test_ray_batch_job_writes_the_same_rows_as_one_process(built, run) -> None:
    progress: list[tuple[int, int]] = []
    report = build_views(run, BatchSettings(SETTINGS, buckets=3), lambda done, total: progress.append((done, total)))
    assert progress[-1] == (9, 9)
    assert set(report.rows) == set(VIEWS)
    for view in VIEWS:
        written = rows_of(pq.read_table(run.features / "views" / view))
        alone = rows_of(pq.read_table(built.run.features / "views" / view))
        assert written.equals(alone), view
        assert report.rows[view] == alone.num_rows
    assert not list(run.features.glob(".*")), "partitions and half-written folders are gone"


def test_features_command_skips_finished_steps(run) -> None:
    app = typer.Typer()
    command.register(app)
    cli = CliRunner()

    def call(*arguments: str):
        return cli.invoke(app, ["features", *arguments, "--run", str(run.path)], catch_exceptions=False)

    assert call().exit_code == 0
    training_rows = pq.read_table(run.features / "training_rows.parquet")
    assert training_rows.num_rows == 2000
    until_s = run.record("features")["summary"]["until_s"]
    assert materialised_at_s(run.features) == until_s
    assert ViewerRowReader(open_feature_store(run.features)).read(500)["region"] in ("eu", "us")

    with pytest.MonkeyPatch.context() as patch:  # the views of data of today end at midnight
        patch.setattr(command, "time", SimpleNamespace(time=lambda: until_s - 3600))
        assert call("materialise").exit_code == 0
    assert materialised_at_s(run.features) == until_s - 3600
    assert call().exit_code == 0
    assert materialised_at_s(run.features) == until_s

    again = call()
    assert "features: already done with the same inputs, skipped" in again.output
    assert "materialise: already done with the same inputs, skipped" in again.output

    with pytest.raises(ParityError, match="no served vectors") as caught:
        call("parity")
    assert caught.value.exit_code == 4


def test_data_set_without_impressions_is_rejected_before_ray_starts(run) -> None:
    path = run.dataset / "impressions.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(EmptyDatasetError, match="no impressions; simulate or import a data set"):
        build_views(run, BatchSettings(SETTINGS))
    path.unlink()
    with pytest.raises(EmptyDatasetError, match="run `reelway simulate`"):
        build_views(run, BatchSettings(SETTINGS))


def test_partitions_are_stable_per_id_with_similar_sizes() -> None:
    buckets = partition_of(pa.chunked_array([pa.array(range(8000), pa.int64())]), 8).to_pylist()
    counts = [buckets.count(b) for b in range(8)]
    assert min(counts) > 800
    assert buckets[:6] == partition_of(pa.chunked_array([pa.array(range(6), pa.int64())]), 8).to_pylist()
