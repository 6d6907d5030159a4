"""What a stream reads of a run: settings and TTLs of the views, labels, and the data set's videos and creators."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from reelway.pipelines.features.materialisation import materialised_at_s
from reelway.pipelines.features.stream.bootstrap import DatasetState
from reelway.pipelines.features.stream.time_buckets import STREAMED
from reelway.pipelines.features.stream.video_facts import VideoFacts
from reelway.pipelines.features.training_rows import LABELS_FILE, read_feature_file
from reelway.pipelines.features.views import SECOND_US, ViewSettings
from reelway.platform.errors import FeatureError
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.run_directory import RunDirectory


def view_settings(run: RunDirectory) -> ViewSettings:
    """Returns the grids and priors of the run's features. The stream uses the same values."""
    return ViewSettings.from_config(run.record("features")["config"]["views"])


def view_ttl_us(run: RunDirectory) -> dict[str, int]:
    """Returns the TTL of each streamed view, as registered with Feast."""
    store = open_feature_store(run.features)
    return {view: int(store.get_feature_view(view).ttl.total_seconds() * SECOND_US) for view in STREAMED}


def video_facts(run: RunDirectory) -> VideoFacts:
    return VideoFacts(run.dataset / "videos.parquet")


def load_dataset(run: RunDirectory) -> DatasetState:
    """Reads what a stream without a state begins with.

    Raises:
        FeatureError: if the run has no features or no data set.
    """
    tables: dict[str, pa.Table] = {}
    for name in ("videos", "creators"):
        try:
            tables[name] = pq.read_table(run.dataset / f"{name}.parquet")
        except FileNotFoundError as error:
            raise FeatureError(
                f"{run.dataset}: {name}.parquet not found; simulate or import a data set first"
            ) from error
    filled_s = materialised_at_s(run.features)
    filled_us = None if filled_s is None else round(filled_s * SECOND_US)
    return DatasetState(read_feature_file(run.features / LABELS_FILE), tables["videos"], tables["creators"], filled_us)
