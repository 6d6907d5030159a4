"""The batch job: computes labels and all feature views in a Ray Data pipeline.

Events are written once per entity kind, partitioned by a hash of the entity. Each partition is one task, so all
events of a viewer (video, creator) are in one task. Window sums are integers, so the result does not depend on the
number of partitions and machines. Ray Data's own shuffle gives the same partitions, but its set-up costs more than it
saves on a small data set.

``views.py`` defines the features. New views replace the previous ones atomically.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reelway.pipelines.features import views
from reelway.pipelines.features.labels import label_impressions, times_us
from reelway.pipelines.features.training_rows import CATALOGUE_FILE, LABELS_FILE
from reelway.pipelines.features.views import Events, ViewSettings
from reelway.platform.atomic_files import atomic_directory, atomic_file
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.errors import EmptyDatasetError, FeatureError
from reelway.platform.features.hashing import mix64
from reelway.platform.run_directory import RunDirectory
from reelway.platform.stop_signals import preserved_stop_signals

VIEWS_FOLDER: Final = "views"
_EVENT_COLUMNS: Final = [
    "impression_id", "viewer_id", "video_id", "creator_id", "video_topic", "event_time", "outcome_time",
    "long_watch", "like", "skip", "follow", "watch_s", "weight",
]  # fmt: skip
ENTITY_KEYS: Final = {"viewer": "viewer_id", "video": "video_id", "creator": "creator_id"}

Report = Callable[[int, int], None]
"""Called with the number of finished partitions and the total."""


@dataclass(frozen=True)
class BatchSettings:
    """Resources and partitioning of the batch job. They do not change the value of any feature.

    ``cpus``: CPUs of the local Ray runtime; ignored when joining a cluster. ``ray_address``: ``local`` starts a
    runtime, ``auto`` or ``ray://...`` joins one. ``buckets``: partitions per entity kind. More partitions than CPUs
    spread the load when one partition is larger than the others.
    """

    views: ViewSettings
    cpus: int = 2
    buckets: int = 8
    ray_address: str = "local"


@dataclass(frozen=True)
class BatchReport:
    """Summary of what the batch job wrote."""

    impressions: int
    until_s: float  # no row of the views is later
    rows: dict[str, int]  # per view


def _silent(_done: int, _total: int) -> None:
    return None


def build_views(run: RunDirectory, settings: BatchSettings, report: Report = _silent) -> BatchReport:
    """Reads the run's data set and writes ``labels.parquet``, ``catalogue.parquet`` and ``views/<view>/*.parquet``.

    Raises:
        EmptyDatasetError: if there are no impressions.
        FeatureError: if a task failed and its retries are used up.
        StorageError: if the disk is full; the previous views are unchanged.
    """
    tables = {name: _read_table(run.dataset / f"{name}.parquet") for name in DATASET_TABLES}
    if not tables["impressions"].num_rows:
        raise EmptyDatasetError(f"{run.dataset}: no impressions; simulate or import a data set")
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    until_us = data_end_us(labels)
    _write(labels, run.features / LABELS_FILE)
    _write(tables["videos"].select(["video_id", "creator_id", "uploaded_at", "title"]), run.features / CATALOGUE_FILE)
    rows: dict[str, int] = {}
    with atomic_directory(run.features / VIEWS_FOLDER) as folder:
        for name, table in (
            ("viewer_profile", views.viewer_profile(tables["viewers"])),
            ("video_content", views.video_content(tables["videos"])),
        ):
            rows[name] = _write_part(table, folder, name, 0)
        creators = (tables["creators"], tables["videos"].select(["creator_id", "uploaded_at"]))
        with _partitions(labels, run.features, settings.buckets) as partitions, _ray(settings):
            rows |= _run_entity_kinds(partitions, folder, creators, until_us, settings, report)
    return BatchReport(labels.num_rows, until_us / 1e6, rows)


def data_end_us(labels: pa.Table) -> int:
    """Returns the first day boundary at which all data is known."""
    known_us = int(times_us(labels["outcome_time"]).max()) + views.AFTER_US
    return -(-known_us // views.DAY_US) * views.DAY_US


def entity_views(
    entity_kind: str, labels: pa.Table, creators: tuple[pa.Table, pa.Table], settings: ViewSettings, until_us: int
) -> dict[str, pa.Table]:
    """Returns the views of one entity kind, computed from all events of a subset of its entities."""
    events = Events.from_labels(labels)
    if entity_kind == "viewer":
        return {
            "viewer_activity": views.viewer_activity(events, settings, until_us),
            "viewer_history": views.viewer_history(events, settings, until_us),
            "viewer_topic_affinity": views.viewer_topic_affinity(events, settings, until_us),
        }
    if entity_kind == "video":
        return {"video_engagement": views.video_engagement(events, settings, until_us)}
    creator_table, uploads = creators
    return {"creator_statistics": views.creator_statistics(events, uploads, creator_table, settings, until_us)}


def partition_of(ids: pa.ChunkedArray, buckets: int) -> pa.Array:
    """Returns a stable partition number per id."""
    return pa.array((mix64(ids.to_numpy().astype(np.uint64)) % np.uint64(buckets)).astype(np.int32))


def _partition_rows(table: pa.Table, column: str, bucket: int, buckets: int) -> pa.Table:
    return table.filter(pa.array(partition_of(table[column], buckets).to_numpy() == bucket))


def _write_partitions(labels: pa.Table, folder: Path, buckets: int) -> None:
    """Writes the event columns once per entity kind, one file per partition. Each task reads only its own file."""
    for entity_kind, key in ENTITY_KEYS.items():
        bucket = partition_of(labels[key], buckets)
        order = np.argsort(bucket.to_numpy(), kind="stable")
        ends = np.searchsorted(bucket.to_numpy()[order], np.arange(buckets), side="right")
        events = labels.select(_EVENT_COLUMNS).take(pa.array(order))
        for b, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            _write(events.slice(start, end - start), folder / entity_kind / f"{b:04d}.parquet")


def _write_bucket(
    task: dict[str, Any],
    *,
    partitions: Path,
    creators: tuple[pa.Table, pa.Table],
    settings: ViewSettings,
    until_us: int,
    folder: Path,
    buckets: int,
) -> dict[str, Any]:
    """Computes one partition's views and writes one file per view, named after the partition. Idempotent."""
    entity_kind, bucket = str(task["family"]), int(task["bucket"])
    events = pq.read_table(partitions / entity_kind / f"{bucket:04d}.parquet")
    bucket_creators = tuple(_partition_rows(table, "creator_id", bucket, buckets) for table in creators)
    views = entity_views(entity_kind, events, (bucket_creators[0], bucket_creators[1]), settings, until_us)
    rows = {view: _write_part(table, folder, view, bucket) for view, table in views.items()}
    return {"rows": json.dumps(rows)}


def _run_entity_kinds(
    partitions: Path,
    folder: Path,
    creators: tuple[pa.Table, pa.Table],
    until_us: int,
    settings: BatchSettings,
    report: Report,
) -> dict[str, int]:
    import ray
    from ray.exceptions import RayError

    write = partial(
        _write_bucket, partitions=partitions, creators=creators, settings=settings.views, until_us=until_us,
        folder=folder, buckets=settings.buckets,
    )  # fmt: skip
    tasks = [
        {"family": entity_kind, "bucket": bucket} for bucket in range(settings.buckets) for entity_kind in ENTITY_KEYS
    ]
    rows: dict[str, int] = {}
    try:
        written = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(write)
        for done, result in enumerate(written.iter_rows(), start=1):
            for view, count in json.loads(result["rows"]).items():
                rows[view] = rows.get(view, 0) + count
            report(done, len(tasks))
    except RayError as error:
        raise FeatureError(f"Ray: batch features failed: {error}") from error
    return rows


@contextmanager
def _partitions(labels: pa.Table, folder: Path, buckets: int) -> Iterator[Path]:
    """Writes the partitioned events to storage that all tasks share, and deletes them on exit."""
    with tempfile.TemporaryDirectory(prefix=".partitions.", dir=folder) as name:
        _write_partitions(labels, Path(name), buckets)
        yield Path(name)


@contextmanager
def _ray(settings: BatchSettings) -> Iterator[None]:
    """Connects to a running Ray runtime or a cluster, or starts a local runtime and stops it on exit."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        local: dict[str, Any] = {"num_cpus": settings.cpus} if settings.ray_address == "local" else {}
        with preserved_stop_signals():
            ray.init(
                address=settings.ray_address, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
                **local,
            )  # fmt: skip
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Ray Data resets its log levels when a pipeline starts
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = before
        logging.disable(quiet)
        if started_here:
            ray.shutdown()


def _write_part(table: pa.Table, folder: Path, view: str, bucket: int) -> int:
    path = folder / view / f"bucket-{bucket:04d}.parquet"
    _write(table, path)
    return int(table.num_rows)


def _write(table: pa.Table, path: Path) -> None:
    with atomic_file(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise EmptyDatasetError(f"{path}: not found; run `reelway simulate` or `reelway import` first") from None
