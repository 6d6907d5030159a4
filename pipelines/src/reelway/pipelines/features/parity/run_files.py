"""Files of a run on local disk or below an fsspec URL, as the replay reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from reelway.pipelines.features.materialisation import MATERIALISATION_FILE
from reelway.pipelines.features.stream.clock import STREAM_CLOCK_FILE, StreamClock
from reelway.pipelines.features.training_rows import LABELS_FILE
from reelway.pipelines.features.views import ViewSettings
from reelway.pipelines.features.windows import I64
from reelway.platform.atomic_files import atomic_file
from reelway.platform.errors import ConfigError, FeatureError, StorageError
from reelway.platform.features.feast_store import import_feast

BATCH_ROWS: Final = 100_000


class RunFiles:
    """A folder of files that other methods name by their relative paths.

    Raises:
        ConfigError: if the URL cannot be opened.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location).rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.location)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"run {self.location!r}: cannot open it: {error}; expected a path or an URL") from error
        self._local = isinstance(self._files, LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """Returns a file's content, None if it does not exist."""
        with self._storage_errors(f"read {name}"):
            try:
                content: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return content

    def read_json(self, name: str) -> Any:
        content = self.read(name)
        return None if content is None else json.loads(content)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, which is complete or unchanged."""
        with self._storage_errors(f"write {name}"):
            if self._local:
                with atomic_file(Path(self._path(name))) as temporary:
                    temporary.write_bytes(content)
                return
            self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(self._path(name), content)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, sort_keys=True).encode())

    def write_table(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, sink.getvalue().to_pybytes())

    def remove(self, name: str) -> None:
        with self._storage_errors(f"remove {name}"):
            if self._files.exists(self._path(name)):
                self._files.rm_file(self._path(name))

    def names(self, folder: str) -> list[str]:
        """Returns the names of the files in a folder, sorted; none if it does not exist."""
        with self._storage_errors(f"list {folder}"):
            self._files.invalidate_cache()
            if not self._files.isdir(self._path(folder)):
                return []
            found = self._files.ls(self._path(folder), detail=False)
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def read_table(self, name: str) -> pa.Table:
        """Returns a Parquet file.

        Raises:
            FeatureError: if it does not exist.
        """
        return pa.Table.from_batches(list(self.batches(name)), schema=self._schema(name))

    def batches(self, name: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a Parquet file in order, ``BATCH_ROWS`` at a time.

        Raises:
            FeatureError: if it does not exist.
        """
        with self._opened(name) as handle:
            yield from pq.ParquetFile(handle).iter_batches(batch_size=BATCH_ROWS, columns=columns)

    def _schema(self, name: str) -> pa.Schema:
        with self._opened(name) as handle:
            return pq.ParquetFile(handle).schema_arrow

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with self._storage_errors(f"read {name}"):
            try:
                handle = self._files.open(self._path(name), "rb")
            except FileNotFoundError:
                raise FeatureError(
                    f"{self.location}/{name}: not found; run `reelway features --run {self.location}` first"
                ) from None
        with handle:
            yield handle

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _storage_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.location}: cannot {action}: {error}") from error


@dataclass(frozen=True)
class RunTables:
    """What the replay reads of a run once: the data set's tables, the views' settings and TTLs, and the clock."""

    viewers: pa.Table
    videos: pa.Table  # ascending video_id
    creators: pa.Table
    settings: ViewSettings
    ttl_us: Mapping[str, int]
    clock: StreamClock | None
    """None if no stream has run; the event log does not count then."""
    materialised_at_s: float | None

    def video_rows(self, video_ids: I64) -> I64:
        """Returns the rows of the videos in ``videos``, -1 for an unknown video."""
        ids = self.videos["video_id"].to_numpy()
        if not len(ids):
            return np.full(len(video_ids), -1, dtype=np.int64)
        row = np.minimum(np.searchsorted(ids, video_ids), len(ids) - 1)
        return np.where(ids[row] == video_ids, row, -1)


def read_run_tables(files: RunFiles) -> RunTables:
    """Reads a run.

    Raises:
        FeatureError: if the run has no data set or no features.
        StorageError: if its files cannot be read.
    """
    record = files.read_json("steps/features.json")
    registry = files.read("features/registry.db")
    if record is None or registry is None:
        raise FeatureError(f"{files.location}: no features; run `reelway features --run {files.location}` first")
    online = files.read_json(f"features/{MATERIALISATION_FILE}")
    clock = files.read_json(STREAM_CLOCK_FILE)
    return RunTables(
        viewers=files.read_table("dataset/viewers.parquet"),
        videos=files.read_table("dataset/videos.parquet").sort_by("video_id").combine_chunks(),
        creators=files.read_table("dataset/creators.parquet"),
        settings=ViewSettings.from_config(record["config"]["views"]),
        ttl_us=_registered_ttl_us(registry),
        clock=StreamClock(**clock) if clock else None,
        materialised_at_s=float(online["at_s"]) if online else None,
    )


def label_batches(files: RunFiles) -> Iterator[pa.Table]:
    """Yields the labelled impressions of the data set.

    Raises:
        FeatureError: if the features are not built.
    """
    for batch in files.batches(f"features/{LABELS_FILE}"):
        yield pa.Table.from_batches([batch])


def _registered_ttl_us(registry: bytes) -> dict[str, int]:
    """Returns the TTL of each view that is registered with Feast."""
    import_feast()
    from feast.protos.feast.core.Registry_pb2 import Registry

    views = Registry.FromString(registry).feature_views
    return {view.spec.name: view.spec.ttl.ToMicroseconds() for view in views}
