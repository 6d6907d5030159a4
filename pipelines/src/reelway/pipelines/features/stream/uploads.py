"""Uploads as rows of a release's video table: features by the functions of the batch, embeddings by the video tower.

``VideoRows`` holds one release. A row equals the row that a build of the release would have written for the video, with
unknown live features.
"""

# Shapes: U uploads, N videos of the release, D embedding

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.views import video_content
from reelway.pipelines.release_tables import video_columns
from reelway.platform.contracts.events import VIDEOS
from reelway.platform.contracts.feature_dimensions import video_tower_inputs
from reelway.platform.contracts.manifest import VIDEO_TOWER_FILE, VIDEOS_FILE
from reelway.platform.contracts.release_files import videos_schema
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.eventlog.catalogue_events import VideoUpsert
from reelway.platform.features.assembly import VideoArrays, assemble_videos, columns_from_table
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.tables import open_table

F32 = NDArray[np.float32]
MAX_EMBEDDING_DIFFERENCE: Final = 1e-4
"""Difference up to which two embeddings are those of the same content."""
_COMPARED: Final = ("creator_id", "topic", "uploaded_at_s", "creator_codes", "video_categories", "static_dense")


class VideoRows:
    """Computes rows of one release's video table.

    Args:
        folder: folder of a verified release.

    Raises:
        IncompatibleReleaseError: if ``videos.arrow`` or ``video_tower.onnx`` does not have its format.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        self.release = manifest.release_id
        self.dimensions = manifest.dimensions.features
        self.embedding_dim = manifest.dimensions.embedding
        self._schema = videos_schema(self.embedding_dim)
        self._table = open_table(folder / VIDEOS_FILE, self._schema)
        self._video_id: NDArray[np.int64] = self._table.column("video_id").to_numpy()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = folder / VIDEO_TOWER_FILE
        try:
            self._tower = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise IncompatibleReleaseError(f"{path}: not a graph that ONNX Runtime can open: {error}") from error

    def __len__(self) -> int:
        """The videos of the release, N."""
        return int(self._table.num_rows)

    def rows_of(self, upserts: Sequence[VideoUpsert]) -> pa.Table:
        """Returns the row of each upload, with the columns of ``videos_schema``.

        Raises:
            FeatureError: if a topic is not among those of the release; ``VideoUpsert.problem`` finds these before.
        """
        snapshot = upload_snapshot(upserts)
        videos = assemble_videos(columns_from_table(snapshot), np.full(len(upserts), time.time()), self.dimensions)
        columns = video_columns(snapshot, videos, self.embed(videos))
        return pa.Table.from_arrays(columns, schema=self._schema)

    def embed(self, videos: VideoArrays) -> F32:
        """Returns the embeddings of the release's own video tower, ``[U, D]``."""
        feed: Mapping[str, Any] = {
            name: (values := getattr(videos, name)).astype(np.int64 if values.dtype.kind == "i" else np.float32)
            for name in video_tower_inputs(self.dimensions)
        }
        embedding: F32 = self._tower.run(None, feed)[0]
        return embedding

    def differ_from_release(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Whether each row differs from the release's own row of the video, or the release has none. ``-> [U]``."""
        ids = rows["video_id"].to_numpy()
        index = np.minimum(np.searchsorted(self._video_id, ids), len(self._video_id) - 1)
        known = np.flatnonzero(self._video_id[index] == ids)
        differs = np.ones(len(ids), dtype=np.bool_)
        if not len(known):
            return differs
        own, new = self._table.take(pa.array(index[known])), rows.take(pa.array(known))
        same = np.array(own.column("title").to_pylist(), object) == np.array(new["title"].to_pylist(), object)
        for name in _COMPARED:
            equal = np.equal(_matrix(own.column(name)), _matrix(new[name]))
            same &= equal.reshape(len(known), -1).all(axis=1)
        difference = np.abs(_matrix(own.column("embedding")) - _matrix(new["embedding"]))
        same &= (difference <= MAX_EMBEDDING_DIFFERENCE).reshape(len(known), -1).all(axis=1)
        differs[known] = ~same
        return differs


def upload_snapshot(upserts: Sequence[VideoUpsert]) -> pa.Table:
    """Returns uploads as a table with ``title`` and the fields of the view ``video_content``, in the given order."""
    columns = {name: [getattr(upsert, name) for upsert in upserts] for name in VIDEOS.names}
    videos = pa.table([pa.array(columns[field.name], field.type) for field in VIDEOS], schema=VIDEOS)
    return video_content(videos).append_column("title", videos["title"])


def _matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_fixed_size_list(array.type):
        values: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(array), array.type.list_size)
    flat: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return flat
