"""A data set with 512-wide text, no audio and five topics is imported, trained, released and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.pipelines.event_tables import START_US, random_dataset
from tests.support.pipelines.trained_run import write_evaluation, write_features

from reelway.pipelines.commands.import_dataset import import_events
from reelway.pipelines.datasets.store import read_dataset
from reelway.pipelines.features.training_rows import build_training_rows
from reelway.pipelines.release_builder import build_release
from reelway.pipelines.training.config import load_config
from reelway.pipelines.training.rows import load_rows
from reelway.pipelines.training.train_run import ROWS_FILE, Resources, train_run
from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import MalformedFileError
from reelway.platform.features.dimensions import read_dimensions, write_dimensions
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.run_directory import RunDirectory
from reelway.platform.tokens import TokenSigner
from reelway.serving.release_loader import ReleaseLoader

WIDE = FeatureDimensions(
    visual=24, audio=0, text=512, topics=5, history_length=7, category_buckets=16, id_buckets=1 << 17
)
SMALL = (
    "two_tower.dim=16", "two_tower.context_hidden=16", "two_tower.content_hidden=16", "two_tower_loop.epochs=1",
    "ranker.expert_hidden=8", "ranker.expert_out=8", "ranker.head_hidden=8", "ranker_loop.epochs=1",
)  # fmt: skip
DAY_S = 86_400


def write_sources(folder: Path) -> tuple[Path, Path]:
    """Events and videos of a random data set, in the format of ``reelway import events``."""
    tables = random_dataset(requests=150)
    shown, outcomes = tables["impressions"], tables["outcomes"]
    rows = {impression: row for row, impression in enumerate(shown["impression_id"].to_pylist())}
    columns: dict[str, Any] = {name: shown[name] for name in shown.column_names if name not in ("release", "arm")}
    signals = {kind.value: np.zeros(shown.num_rows) for kind in OutcomeType}
    signals["watch"][:] = np.nan
    for outcome in outcomes.to_pylist():
        signals[outcome["type"]][rows[outcome["impression_id"]]] = outcome["value"]
    columns |= {"watch_ms" if name == "watch" else name: pa.array(values) for name, values in signals.items()}
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "events.parquet")
    random = np.random.default_rng(1)
    videos = tables["videos"].drop_columns(["visual", "audio", "text", "topic"])
    count = videos.num_rows
    for name, width in (("visual", WIDE.visual), ("text", WIDE.text)):
        vectors = [None if i % 7 == 0 else random.normal(size=width).astype(np.float32) for i in range(count)]
        videos = videos.append_column(name, pa.array(vectors, pa.list_(pa.float32())))
    videos = videos.append_column("topic", pa.array(np.arange(count) % 6 - 1))
    pq.write_table(videos, folder / "videos.parquet")
    return folder / "events.parquet", folder / "videos.parquet"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("wide")
    events, videos = write_sources(folder / "sources")
    run = RunDirectory(folder / "run")
    import_events(events, videos, run.path, history_length=7, category_buckets=16, id_buckets=1 << 17)
    write_features(run, read_dataset(run.dataset).tables, read_dimensions(run.dataset))
    build_training_rows(run)
    return run


def test_import_records_the_widths_of_the_data_set(run: RunDirectory) -> None:
    assert read_dimensions(run.dataset) == WIDE
    assert read_dataset(run.dataset).dimensions == WIDE
    assert run.record("dataset")["summary"]["dimensions"]["text"] == 512


def test_rows_keep_codes_above_16_bits(run: RunDirectory) -> None:
    rows = load_rows(run.features / ROWS_FILE, WIDE)
    assert rows.videos.video_codes.dtype == np.int32
    assert rows.videos.video_codes.max() > 1 << 15
    assert rows.videos.text.shape[1] == 512
    assert rows.videos.audio.shape[1] == 0
    assert rows.viewers.history_codes.shape[1:] == (7, 2)


def test_rows_reject_lists_of_another_width(run: RunDirectory, tmp_path: Path) -> None:
    narrow = FeatureDimensions(visual=24, audio=0, text=32, topics=5)
    with pytest.raises(MalformedFileError, match=r"column 'text': saw 'a list of 512', expected 32 values"):
        load_rows(run.features / ROWS_FILE, narrow)
    write_dimensions(tmp_path, narrow)
    assert read_dimensions(tmp_path) == narrow


@pytest.mark.timeout(600)
def test_trained_release_serves_a_slate(run: RunDirectory) -> None:
    models = train_run(run, load_config("demo", overrides=SMALL), Resources(ray=False))
    assert models.dimensions == WIDE
    assert set(models.two_tower.video_tower.modalities) == {"visual", "text"}
    write_evaluation(run)
    release_id = build_release(run, name="wide", key=load_private_key(create_keys(run.keys).private))
    folder = ReleaseStore(str(run.release_store)).fetch(release_id, run.path / "cache")
    assert read_manifest(folder).dimensions.features == WIDE

    loader = ReleaseLoader(folder)
    now_s = START_US / 1e6 + 20 * DAY_S
    watched = loader.table().video_id[:4].tolist()
    row = {
        "region": "eu", "topic_affinity": [0.2] * 5, "history_videos": watched, "history_weights": [1.0] * 4,
        "history_times_s": [now_s - 3600.0 * i for i in range(4, 0, -1)],
    }  # fmt: skip
    graph = loader.in_process_recommender(TokenSigner(b"a secret of the tests, long enough"))
    answer = graph.recommend(RecommendRequest(viewer_id=1, count=10), row, now_s)
    assert len(answer.videos) == 10
    assert not answer.degraded
    assert not set(watched) & {video.video_id for video in answer.videos}
