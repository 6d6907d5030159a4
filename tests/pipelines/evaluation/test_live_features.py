"""Features of the closed loop equal the feature store at the cut and follow later events."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from tests.support.live_features import LiveFeatures
from tests.support.pipelines.trained_run import make_trained_run

from reelway.pipelines.datasets.store import read_dataset
from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.training_rows import video_snapshot, viewer_snapshot
from reelway.platform.contracts.feature_names import VIEWER_VIEWS, VIEWS
from reelway.platform.run_directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    trained_run = make_trained_run(tmp_path_factory.mktemp("live") / "run", requests=200)
    (trained_run.dataset / "dataset.json").write_text("{}")
    return trained_run


def cut_of(run: RunDirectory) -> float:
    return float(np.quantile(times_us(read_dataset(run.dataset).impressions["event_time"]) / 1e6, 0.7))


def assert_same(live: pa.Table, stored: pa.Table, fields: list[str]) -> None:
    for field in fields:
        for actual, expected in zip(live[field].to_pylist(), stored[field].to_pylist(), strict=True):
            close = actual == expected or (
                expected is not None and actual == pytest.approx(expected, rel=1e-6, nan_ok=True)
            )
            assert close, (field, actual, expected)


def test_viewer_features_at_the_cut_equal_the_feature_store(run):
    at_s = cut_of(run)
    viewers = np.unique(read_dataset(run.dataset).viewers["viewer_id"].to_numpy())[::3]
    live = LiveFeatures(run, at_s).viewers(viewers, at_s)
    fields = [field for view in VIEWER_VIEWS for field in VIEWS[view]]
    assert_same(live, viewer_snapshot(run.features, viewers, at_s), fields)


def test_video_features_at_the_cut_equal_the_feature_store(run):
    at_s = cut_of(run)
    stored = video_snapshot(run.features, at_s)
    live = LiveFeatures(run, at_s).videos(at_s)
    live = live.filter(pa.array(np.isin(live["video_id"].to_numpy(), stored["video_id"].to_numpy())))
    assert live.num_rows == stored.num_rows
    assert_same(live, stored, [*VIEWS["video_engagement"], *VIEWS["creator_statistics"], *VIEWS["video_content"]])


def test_event_in_the_closed_loop_changes_the_viewer_history(run):
    at_s = cut_of(run)
    dataset = read_dataset(run.dataset)
    after = dataset.impressions.filter(pa.array(times_us(dataset.impressions["event_time"]) >= at_s * 1e6))
    live = LiveFeatures(run, at_s)
    end_s = at_s + 30 * 86_400
    viewers = np.unique(after["viewer_id"].to_numpy())
    before = live.viewers(viewers, end_s)["history_videos"].to_pylist()
    chosen = pa.array(np.isin(dataset.outcomes["impression_id"].to_numpy(), after["impression_id"].to_numpy()))
    live.add(after, dataset.outcomes.filter(chosen))
    now = live.viewers(viewers, end_s)["history_videos"].to_pylist()
    assert before != now
    assert (
        live.viewers(viewers, at_s)["history_videos"].to_pylist()
        == LiveFeatures(run, at_s).viewers(viewers, at_s)["history_videos"].to_pylist()
    )
