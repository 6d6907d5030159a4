"""Creator, topic and duration of videos, for records of the event log that do not state them."""

# Shapes: N videos

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reelway.pipelines.features.windows import I64

_COLUMNS = ["video_id", "creator_id", "topic", "duration_ms"]


class VideoFacts:
    """The videos of a data set, which are read when the first record needs them.

    Args:
        path: ``videos.parquet`` of the data set; a missing file knows no videos.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def lookup(self, video_ids: I64) -> tuple[NDArray[np.bool_], dict[str, I64]]:
        """Returns which videos are known, and per column the values of all; those of unknown videos are arbitrary."""
        columns = self._columns
        ids = columns["video_id"]
        if not len(ids):
            return np.zeros(len(video_ids), np.bool_), {name: np.zeros(len(video_ids), np.int64) for name in columns}
        row = np.minimum(np.searchsorted(ids, video_ids), len(ids) - 1)
        return ids[row] == video_ids, {name: values[row] for name, values in columns.items()}

    @cached_property
    def _columns(self) -> dict[str, I64]:
        if not self._path.exists():
            return {name: np.zeros(0, np.int64) for name in _COLUMNS}
        table = pq.read_table(self._path, columns=_COLUMNS).sort_by("video_id")
        return {name: table[name].to_numpy().astype(np.int64) for name in _COLUMNS}
