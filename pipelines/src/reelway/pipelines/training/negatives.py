"""The ranker's rows, and videos that were not shown as extra rows for data that holds positives only.

An extra row is as of its request: the video had been shown to somebody before, and its numbers come from the same
point-in-time join as the row's own. It refuses to call a video negative that the viewer met within the window.
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
from reelway.platform.contracts.features import CREATOR_STATISTICS, RANKER_TASKS, VIDEO_ENGAGEMENT
from reelway.platform.features.on_demand import hours_since_upload

AsOf = Callable[[str, I64, I64], pa.Table]
"""(view, entities, moments in Unix microseconds) -> the view's fields as known then, null where nothing was."""

_TRIES: Final = 5


@dataclass(frozen=True)
class RankerRows:
    """What the ranker learns from; ``viewer_row`` and ``video_row`` point into ``TrainingRows``."""

    viewer_row: NDArray[np.int32]
    video_row: NDArray[np.int32]
    video_dense: F32
    position: NDArray[np.int16]
    labels: F32
    event_time_s: F64

    def __len__(self) -> int:
        return len(self.viewer_row)

    def where(self, chosen: NDArray[Any]) -> RankerRows:
        """Some of the rows."""
        return RankerRows(**{name: getattr(self, name)[chosen] for name in FIELDS})

    def and_also(self, other: RankerRows) -> RankerRows:
        """These rows, then the other ones."""
        return RankerRows(**{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in FIELDS})


FIELDS: Final = ("viewer_row", "video_row", "video_dense", "position", "labels", "event_time_s")


def shown_rows(rows: TrainingRows, index: I64) -> RankerRows:
    """The impressions of a window as they are."""
    return RankerRows(**{name: getattr(rows, name)[index] for name in FIELDS})


def draw_negatives(rows: TrainingRows, index: I64, count: int, *, seed: int) -> tuple[I64, NDArray[np.int32]]:
    """For each row up to ``count`` videos, uniform over those shown to anybody before its request and never, in the
    window, to its viewer. Fewer where there are none.

    Returns:
        positions into ``index`` and video rows, ``[G]`` each, without repetition of a pair.
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
    whose, chosen = [], []
    for _ in range(_TRIES):
        video = by_first[(random.random(len(open_slots)) * available[open_slots]).astype(np.int64)]
        pair = viewer[open_slots].astype(np.int64) * videos + video
        refused = met[np.minimum(np.searchsorted(met, pair), len(met) - 1)] == pair
        whose.append(open_slots[~refused])
        chosen.append(video[~refused])
        open_slots = open_slots[refused]
    pairs = np.unique(np.concatenate(whose) * videos + np.concatenate(chosen))
    return pairs // videos, (pairs % videos).astype(np.int32)


def negative_rows(
    rows: TrainingRows, index: I64, count: int, as_of: AsOf, *, seed: int, from_s: float = -np.inf
) -> RankerRows:
    """``draw_negatives`` with their features as of each row's request, zero labels and no position.

    Args:
        from_s: leave out the negatives of earlier rows; the others are the same whatever it is.
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
