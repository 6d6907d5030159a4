"""``reelway train`` without Ray, end to end: model files, exports and errors."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.training_row_fixtures import made_table, write_rows
from typer.testing import CliRunner

from reelway.pipelines.models.two_tower import TwoTower
from reelway.pipelines.training.artifacts import TrainedModels, load_models
from reelway.pipelines.training.config import load_config
from reelway.pipelines.training.export import export_ranker, export_video_tower, export_viewer_tower
from reelway.pipelines.training.fit import select_viewers
from reelway.pipelines.training.inference import embed_videos, embed_viewers, ranker_inputs, score
from reelway.pipelines.training.rows import TrainingRows, load_rows
from reelway.pipelines.training.train_run import ROWS_FILE, Resources, train_run
from reelway.platform.cli.main import build_app
from reelway.platform.contracts.feature_dimensions import FeatureDimensions, video_tower_inputs
from reelway.platform.contracts.feature_names import RANKER_INPUTS, RANKER_TASKS, VIEWER_TOWER_INPUTS, VIEWS
from reelway.platform.errors import EmptyDatasetError, MalformedFileError, ReleaseError, TrainingError
from reelway.platform.features.assembly import VideoArrays
from reelway.platform.features.dimensions import write_dimensions
from reelway.platform.run_directory import RunDirectory

SMALL = (
    "two_tower.dim=16", "two_tower.history_length=10", "two_tower_loop.epochs=2", "two_tower_loop.batch_size=128",
    "ranker_loop.epochs=2", "ranker_loop.batch_size=256", "ranker.experts=2", "calibration_fraction=0.2",
)  # fmt: skip
ALONE = Resources(workers=1, ray=False)
Trained = tuple[RunDirectory, TrainedModels, TrainingRows]


def make_run(folder: Path, table: pa.Table) -> RunDirectory:
    run = RunDirectory(folder)
    write_rows(run.features / ROWS_FILE, table)
    write_dimensions(run.features, DIMENSIONS)
    run.record_path("features").parent.mkdir(parents=True)
    run.record_path("features").write_text(json.dumps({"identity": "made", "summary": {}}))
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    table = made_table(requests=400)
    no_shares = pa.array(np.zeros(len(table), np.float32))
    table = table.set_column(table.schema.get_field_index("share"), "share", no_shares)
    run = make_run(tmp_path_factory.mktemp("run"), table)
    models = train_run(run, load_config("demo", overrides=SMALL), ALONE)
    return run, models, load_rows(run.features / ROWS_FILE, DIMENSIONS)


def a_request(models: TrainedModels, rows: TrainingRows, viewer: int) -> dict[str, Any]:
    viewer_arrays = select_viewers(rows, np.array([viewer]))
    videos = dataclasses.replace(rows.videos, video_dense=rows.video_dense[: len(rows.video_ids)])
    return ranker_inputs(
        viewer_arrays, embed_viewers(models.two_tower, viewer_arrays), videos, embed_videos(models.two_tower, videos)
    )


def test_loaded_models_equal_the_trained_models(trained: Trained) -> None:
    run, models, rows = trained
    loaded = load_models(run.models)
    np.testing.assert_array_equal(
        embed_videos(loaded.two_tower, rows.videos), embed_videos(models.two_tower, rows.videos)
    )
    inputs = a_request(models, rows, 3)
    np.testing.assert_array_equal(score(loaded.ranker, inputs), score(models.ranker, inputs))
    assert loaded.info == models.info
    assert loaded.calibration == models.calibration


def test_model_files_hold_no_pickle(trained: Trained) -> None:
    run = trained[0]
    assert sorted(path.name for path in run.models.iterdir()) == [
        "calibration.json", "ranker.json", "ranker.npz", "training.json", "two_tower.json", "two_tower.npz",
    ]  # fmt: skip
    for path in run.models.glob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind in "fbi" for name in arrays.files)


def test_training_record_describes_the_run(trained: Trained) -> None:
    run, models, rows = trained
    info = json.loads((run.models / "training.json").read_text())
    assert info["window_end_s"] == rows.cut_time_s(0.8)
    assert info["window_start_s"] <= info["calibration_start_s"] < info["window_end_s"]
    assert info["config"]["two_tower"]["dim"] == 16
    assert [len(info["curves"][stage]) for stage in ("two_tower", "ranker")] == [2, 2]
    assert set(info["base_rates"]) == set(RANKER_TASKS)
    before = np.searchsorted(rows.event_time_s, models.info.calibration_start_s)
    assert info["rows"] == {"training": len(rows.between(-np.inf, info["window_end_s"])), "ranker": before, "all": 1600}


def test_head_with_one_class_outputs_its_base_rate(
    trained: Trained,
) -> None:
    _, models, rows = trained
    share = score(models.ranker, a_request(models, rows, 3))[:, RANKER_TASKS.index("share")]
    learnt = models.info.rows["ranker"]
    np.testing.assert_allclose(1 / (1 + np.exp(-share)), 0.5 / (learnt + 1), rtol=1e-4)
    assert any("'share' has one class only" in note for note in models.info.notes)
    assert models.calibration.curves["share"].method == "identity"


def test_ranker_learns_taste(
    trained: Trained,
) -> None:
    info = trained[1].info
    assert info.curves["ranker"][1]["watch_s"] < info.curves["ranker"][0]["watch_s"]
    assert info.curves["two_tower"][1]["loss"] < info.curves["two_tower"][0]["loss"]


@pytest.fixture(scope="module")
def graphs(
    trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    _, models, rows = trained
    folder = tmp_path_factory.mktemp("graphs")
    tower = folder / "viewer_tower.onnx"
    ranker = folder / "ranker.onnx"
    assert export_viewer_tower(models.two_tower, tower, select_viewers(rows, np.arange(200))) <= 1e-5
    assert export_ranker(models.ranker, ranker, a_request(models, rows, 3)) <= 1e-5
    return onnxruntime.InferenceSession(str(tower)), onnxruntime.InferenceSession(str(ranker))


def test_viewer_graph_takes_any_number_of_viewers(trained: Trained, graphs: tuple[Any, Any]) -> None:
    _, models, rows = trained
    session = graphs[0]
    assert [declared.name for declared in session.get_inputs()] == list(VIEWER_TOWER_INPUTS)
    assert session.get_inputs()[2].shape[1:] == [DIMENSIONS.history_length, 2]
    for count in (1, 5):
        viewers = select_viewers(rows, np.arange(250, 250 + count))
        feed = {name: getattr(viewers, name) for name in VIEWER_TOWER_INPUTS}
        feed |= {name: feed[name].astype(np.int64) for name in ("viewer_categories", "history_codes")}
        (actual,) = session.run(["viewer_embedding"], feed)
        np.testing.assert_allclose(actual, embed_viewers(models.two_tower, viewers), atol=1e-5)


@pytest.mark.parametrize("dimensions", [DIMENSIONS, replace(DIMENSIONS, audio=0)])
def test_video_graph_takes_any_number_of_videos(
    trained: Trained, tmp_path: Path, dimensions: FeatureDimensions
) -> None:
    """Also of a data set without one of the content vectors."""
    _, models, rows = trained
    everything = vars(rows.videos) | {"audio": rows.videos.audio[:, : dimensions.audio]}
    model = models.two_tower if dimensions == DIMENSIONS else TwoTower(models.two_tower.config, dimensions)
    sample = VideoArrays(**{name: values[:50] for name, values in everything.items()})
    path = tmp_path / "video_tower.onnx"
    assert export_video_tower(model, path, sample) <= 1e-5
    session = onnxruntime.InferenceSession(str(path))
    assert [declared.name for declared in session.get_inputs()] == list(video_tower_inputs(dimensions))
    for count in (1, 7):
        videos = VideoArrays(**{name: values[50 : 50 + count] for name, values in everything.items()})
        feed = {
            name: (values := getattr(videos, name)).astype(np.int64 if values.dtype.kind == "i" else np.float32)
            for name in video_tower_inputs(dimensions)
        }
        (actual,) = session.run(["video_embedding"], feed)
        np.testing.assert_allclose(actual, embed_videos(model, videos), atol=1e-5)


def test_ranker_graph_takes_any_number_of_candidates(trained: Trained, graphs: tuple[Any, Any]) -> None:
    _, models, rows = trained
    session = graphs[1]
    assert [declared.name for declared in session.get_inputs()] == list(RANKER_INPUTS)
    request_inputs = a_request(models, rows, 7)
    for count in (1, 40):
        inputs = {n: v if n in RANKER_INPUTS[:3] else v[:count] for n, v in request_inputs.items()}
        feed = {name: v.astype(np.int64 if v.dtype.kind == "i" else np.float32) for name, v in inputs.items()}
        (actual,) = session.run(["outputs"], feed)
        assert actual.shape == (count, len(RANKER_TASKS))
        np.testing.assert_allclose(actual, score(models.ranker, inputs), atol=1e-5)


def test_export_that_differs_from_torch_leaves_no_file(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, models, rows = trained
    from reelway.pipelines.training import export

    write = export._write

    def write_then_train_on(module: torch.nn.Module, *rest: Any) -> None:
        write(module, *rest)
        with torch.no_grad():
            module.ranker.head_second.bias.add_(1e-3)  # type: ignore[union-attr, operator]

    monkeypatch.setattr(export, "_write", write_then_train_on)
    ranker = load_models(trained[0].models).ranker
    with pytest.raises(ReleaseError, match=r"differs from torch by 0\.001"):
        export_ranker(ranker, tmp_path / "ranker.onnx", a_request(models, rows, 3))
    assert not list(tmp_path.iterdir())


def test_export_rejects_samples_of_another_shape(trained: Trained, tmp_path: Path) -> None:
    run, models, rows = trained
    short = load_rows(run.features / ROWS_FILE, replace(DIMENSIONS, history_length=5))
    with pytest.raises(ReleaseError, match="hold 5 videos, expected 50"):
        export_viewer_tower(models.two_tower, tmp_path / "t.onnx", select_viewers(short, np.arange(3)))
    inputs = a_request(models, rows, 3)
    two = inputs | {"viewer_dense": np.repeat(inputs["viewer_dense"], 2, axis=0)}
    with pytest.raises(ReleaseError, match="one viewer"):
        export_ranker(models.ranker, tmp_path / "r.onnx", two)


def test_damaged_weights_are_rejected_with_their_path(trained: Trained, tmp_path: Path) -> None:
    for path in trained[0].models.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "ranker.npz").write_bytes((tmp_path / "ranker.npz").read_bytes()[:5000])
    with pytest.raises(MalformedFileError, match=r"ranker\.npz"):
        load_models(tmp_path)
    with pytest.raises(TrainingError, match="no finished training; run `reelway train`"):
        load_models(tmp_path / "nothing")


def test_positives_only_data_trains_on_sampled_negatives(tmp_path: Path) -> None:
    table = made_table(requests=200)
    loved = table.filter(pa.array(table["long_watch"].to_numpy() > 0))
    lookups: list[tuple[str, float]] = []

    def as_of(view: str, entities: np.ndarray, at_us: np.ndarray) -> pa.Table:
        lookups.append((view, at_us.max() / 1e6))
        return pa.table({name: pa.array(np.ones(len(entities))) for name in VIEWS[view]})

    config = load_config("demo", overrides=(*SMALL, "sampled_negatives=2", "two_tower_loop.epochs=1"))
    models = train_run(make_run(tmp_path, loved), config, ALONE, as_of=as_of)
    assert [view for view, _ in lookups] == ["video_engagement", "creator_statistics"]
    assert all(latest_s < models.info.window_end_s for _, latest_s in lookups)
    assert 0.3 < models.info.base_rates["long_watch"] < 0.45  # one shown, up to two sampled
    assert not any("'long_watch' has one class" in note for note in models.info.notes)


def test_rows_at_one_instant_cannot_be_split(tmp_path: Path) -> None:
    table = made_table(requests=5)
    same = pa.array([table["event_time"][0]] * len(table))
    run = make_run(tmp_path, table.set_column(table.schema.get_field_index("event_time"), "event_time", same))
    with pytest.raises(EmptyDatasetError, match="0 of 20 rows lie before the cut"):
        train_run(run, load_config("demo", overrides=SMALL), ALONE)


def test_command_skips_a_finished_training(tmp_path: Path) -> None:
    run = make_run(tmp_path, made_table(requests=150))
    args = ["train", "--run", str(run.path), "--no-ray", "--epochs", "1", "--seed", "3"]
    args += [part for value in SMALL for part in ("--set", value)]
    first = CliRunner().invoke(build_app(), args)
    assert first.exit_code == 0, first.output
    assert "two_tower epoch 1/" in first.output
    written = (run.models / "training.json").stat().st_mtime_ns
    again = CliRunner().invoke(build_app(), args)
    assert "train: already done with the same inputs, skipped (use --force to redo)" in again.output
    assert (run.models / "training.json").stat().st_mtime_ns == written
    other = CliRunner().invoke(build_app(), [*args, "--set", "two_tower.dropout=0.3"])
    assert "already done" not in other.output
    assert load_models(run.models).info.config["two_tower"]["dropout"] == 0.3


def test_embedding_does_not_depend_on_the_chunk_size(trained: Trained) -> None:
    _, models, rows = trained
    videos: VideoArrays = rows.videos
    np.testing.assert_allclose(
        embed_videos(models.two_tower, videos, chunk=7), embed_videos(models.two_tower, videos), atol=1e-6
    )
    inputs = a_request(models, rows, 3)
    many = inputs | {name: np.repeat(inputs[name], 2, axis=0) for name in RANKER_INPUTS[:3]}
    index = np.arange(len(rows.video_ids)) % 2
    np.testing.assert_allclose(score(models.ranker, many, index), score(models.ranker, inputs), atol=1e-5)
