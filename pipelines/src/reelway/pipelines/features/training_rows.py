"""Training rows: every labelled impression with all features known at its request.

The join uses the request's time, not the impression's: the router read the features at that time. No impression is
left out; an unknown feature is null. The same join, for one time and many videos or viewers, fills a release's video
table and the online store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reelway.pipelines.features.labels import LABELS, times_us
from reelway.pipelines.features.point_in_time import join_request_context, join_view
from reelway.pipelines.features.windows import I64
from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.feature_names import VIEWER_VIEWS
from reelway.platform.errors import EmptyDatasetError, FeatureError
from reelway.platform.eventlog.erasures import of_known_viewers
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.run_directory import RunDirectory

if TYPE_CHECKING:
    from feast import FeatureStore

LABELS_FILE: Final = "labels.parquet"
CATALOGUE_FILE: Final = "catalogue.parquet"
TRAINING_ROWS_FILE: Final = "training_rows.parquet"

KEY_COLUMNS: Final = (
    "impression_id", "request_id", "viewer_id", "video_id", "event_time", "device", "position", "source", "propensity",
)  # fmt: skip
VIDEO_VIEWS: Final = ("video_content", "video_engagement", "creator_statistics")

Report = Callable[[str], None]


def _silent(_: str) -> None:
    return None


def build_training_rows(run: RunDirectory, report: Report = _silent) -> Path:
    """Joins every labelled impression with all feature views and writes ``training_rows.parquet``.

    Columns: ``KEY_COLUMNS``, ``request_time_s``, ``LABELS``, ``weight``, and each feature under its contract name
    (including ``creator_id``). Rows are in the order of impressions, by time.

    Args:
        report: called with the name of each view before it is joined.

    Raises:
        FeatureError: if the views are not built or not registered.
        EmptyDatasetError: if there are no impressions.
    """
    labels = of_known_viewers(read_feature_file(run.features / LABELS_FILE))
    if not labels.num_rows:
        raise EmptyDatasetError(f"{run.features / LABELS_FILE}: no impressions; simulate or import a data set")
    store = open_feature_store(run.features)
    moment_us = times_us(labels["request_time"])
    columns: dict[str, pa.ChunkedArray | pa.Array] = {name: labels[name] for name in KEY_COLUMNS}
    columns["request_time_s"] = pa.array(moment_us / 1e6, pa.float64())
    columns |= {name: labels[name] for name in (*LABELS, "weight")}
    viewer, video = labels["viewer_id"].to_numpy(), labels["video_id"].to_numpy()
    for view in VIEWER_VIEWS:
        report(view)
        columns |= _columns(join_view(store, view, viewer, moment_us))
    columns |= _video_columns(store, video, labels["creator_id"].to_numpy(), moment_us, report)
    if columns["creator_id"].null_count:  # a video shown before its upload (clock skew): use the creator of the labels
        columns["creator_id"] = labels["creator_id"]
    report("request_context")
    columns |= _columns(join_request_context(store, viewer, video, moment_us))
    path = run.features / TRAINING_ROWS_FILE
    with atomic_file(path) as aside:
        pq.write_table(pa.table(columns), aside, compression="zstd", row_group_size=50_000)
    return path


def video_snapshot(features_dir: Path, at_s: float) -> pa.Table:
    """Returns every video uploaded by ``at_s`` with its features at that time.

    Columns: ``video_id``, ``title`` and all fields of the video views. One row per video, by ascending ``video_id``.
    """
    catalogue = read_feature_file(features_dir / CATALOGUE_FILE).sort_by("video_id")
    at_us = round(at_s * 1e6)
    catalogue = catalogue.filter(pa.array(times_us(catalogue["uploaded_at"]) <= at_us))
    video = catalogue["video_id"].to_numpy()
    moment_us = np.full(len(video), at_us, dtype=np.int64)
    features = _video_columns(
        open_feature_store(features_dir), video, catalogue["creator_id"].to_numpy(), moment_us, _silent
    )
    return pa.table({"video_id": catalogue["video_id"], "title": catalogue["title"], **features})


def viewer_snapshot(features_dir: Path, viewer_ids: Sequence[int] | NDArray[np.int64], at_s: float) -> pa.Table:
    """Returns the given viewers' features at ``at_s``, in the given order.

    Columns: ``viewer_id`` and all fields of the viewer views.
    """
    store = open_feature_store(features_dir)
    viewer = np.asarray(viewer_ids, dtype=np.int64)
    moment_us = np.full(len(viewer), round(at_s * 1e6), dtype=np.int64)
    columns: dict[str, pa.ChunkedArray] = {"viewer_id": pa.chunked_array([pa.array(viewer)])}
    for view in VIEWER_VIEWS:
        columns |= _columns(join_view(store, view, viewer, moment_us))
    return pa.table(columns)


def _video_columns(
    store: FeatureStore, video: I64, creator: I64, moment_us: I64, report: Report
) -> dict[str, pa.ChunkedArray]:
    columns: dict[str, pa.ChunkedArray] = {}
    for view in VIDEO_VIEWS:
        report(view)
        entity = creator if view == "creator_statistics" else video
        columns |= _columns(join_view(store, view, entity, moment_us))
    return columns


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))


def read_feature_file(path: Path) -> pa.Table:
    """Reads a Parquet file of the features folder.

    Raises:
        FeatureError: if the file does not exist.
    """
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise FeatureError(f"{path}: not found; run `reelway features --run {path.parent.parent}` first") from None
