"""The ranker's rows, and sampled negatives for data that holds positives only.

A sampled negative is a video that some viewer was shown before the request, and that the request's viewer was never
shown within the window. Its features come from the same point-in-time join as those of the impressions.
"""

# Shapes: N rows, G negatives, M videos, K tasks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.training.rows import F32, F64, I64, TrainingRows
from reelway.platform.contracts.feature_names import CREATOR_STATISTICS, RANKER_TASKS, VIDEO_ENGAGEMENT
from reelway.platform.features.on_demand import hours_since_upload

PointInTimeLookup = Callable[[str, I64, I64], pa.Table]
"""(view, entities, times in Unix microseconds) -> the view's fields as known then; null if unknown."""

_TRIES: Final = 5


@dataclass(frozen=True)
class RankerRows:
    """Rows that the ranker learns from; ``viewer_row`` and ``video_row`` are indices into ``TrainingRows``."""

    viewer_row: NDArray[np.int32]
    video_row: NDArray[np.int32]
    video_dense: F32
    position: NDArray[np.int16]
    labels: F32
    event_time_s: F64

    def __len__(self) -> int:
        return len(self.viewer_row)

    def select(self, chosen: NDArray[Any]) -> RankerRows:
        return RankerRows(**{name: getattr(self, name)[chosen] for name in FIELDS})

    def concat(self, other: RankerRows) -> RankerRows:
        """Returns these rows followed by the other rows."""
        return RankerRows(**{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in FIELDS})


FIELDS: Final = ("viewer_row", "video_row", "video_dense", "position", "labels", "event_time_s")


def impression_rows(rows: TrainingRows, index: I64) -> RankerRows:
    """Returns a window's impressions."""
    return RankerRows(**{name: getattr(rows, name)[index] for name in FIELDS})


def draw_negatives(rows: TrainingRows, index: I64, count: int, *, seed: int) -> tuple[I64, NDArray[np.int32]]:
    """Draws up to ``count`` negatives per row.

    The draw is uniform over the videos that any viewer was shown before the row's request, without those that its
    viewer was shown within the window. A row gets fewer negatives if there are too few such videos.

    Returns:
        Positions into ``index`` and video rows, ``[G]`` each, without repeated pairs.
    """
    random = np.random.default_rng([seed, 2])
    videos = len(rows.video_ids)
    first_s = np.full(videos, np.inf)
    np.minimum.at(first_s, rows.video_row[index], rows.event_time_s[index])
    by_first = np.argsort(first_s, kind="stable")
    available = np.searchsorted(first_s[by_first], rows.request_time_s[index], side="left")
    _, viewer = np.unique(rows.viewer_id[index], return_inverse=True)
    met = np.unique(viewer.astype(np.int64) * videos + rows.video_row[index])

    open_slots = np.repeat(np.flatnonzero(available > 0), count)
    owners, chosen = [], []
    for _ in range(_TRIES):
        video = by_first[(random.random(len(open_slots)) * available[open_slots]).astype(np.int64)]
        pair = viewer[open_slots].astype(np.int64) * videos + video
        rejected = met[np.minimum(np.searchsorted(met, pair), len(met) - 1)] == pair
        owners.append(open_slots[~rejected])
        chosen.append(video[~rejected])
        open_slots = open_slots[rejected]
    pairs = np.unique(np.concatenate(owners) * videos + np.concatenate(chosen))
    return pairs // videos, (pairs % videos).astype(np.int32)


def negative_rows(
    rows: TrainingRows, index: I64, count: int, as_of: PointInTimeLookup, *, seed: int, from_s: float = -np.inf
) -> RankerRows:
    """Returns ``draw_negatives`` as rows: features as of each request, zero labels, no position.

    Args:
        from_s: time before which rows get no negatives; the negatives of the other rows do not depend on it.
    """
    position, video = draw_negatives(rows, index, count, seed=seed)
    late = rows.event_time_s[index[position]] >= from_s
    origin, video = index[position[late]], video[late]
    moment_s = rows.request_time_s[origin]
    moment_us = np.rint(moment_s * 1e6).astype(np.int64)
    engagement = as_of("video_engagement", rows.video_ids[video], moment_us)
    creators = as_of("creator_statistics", rows.video_creator_id[video], moment_us)
    live = np.column_stack(
        [*(_floats(engagement, name) for name in VIDEO_ENGAGEMENT), *(_floats(creators, n) for n in CREATOR_STATISTICS)]
    )
    age_h = hours_since_upload(moment_s, rows.video_uploaded_at_s[video])
    return RankerRows(
        viewer_row=rows.viewer_row[origin],
        video_row=video,
        # the order of VIDEO_DENSE: static, live, hours since upload
        video_dense=np.column_stack([rows.videos.video_static_dense[video], live, age_h]).astype(np.float32),
        position=np.full(len(origin), -1, dtype=np.int16),
        labels=np.zeros((len(origin), len(RANKER_TASKS)), dtype=np.float32),
        event_time_s=rows.event_time_s[origin],
    )


def _floats(table: pa.Table, name: str) -> F64:
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
