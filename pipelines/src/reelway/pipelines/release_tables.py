"""The tables of a release: videos, popularity lists, item-to-item neighbours.

Pure functions compute the tables from arrays, and writers write them as Arrow files that serving maps into memory. A
writer raises an error for rows that serving could not use.
"""

# Shapes: N videos, D embedding, E labelled impressions, K neighbours

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import VIDEO_STATIC_DENSE
from reelway.platform.contracts.release_files import (
    NEIGHBOURS_PER_VIDEO,
    NEIGHBOURS_SCHEMA,
    POPULAR_SCHEMA,
    videos_schema,
    with_dimensions,
)
from reelway.platform.errors import EmptyDatasetError, ReleaseError
from reelway.platform.features.assembly import VideoArrays

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

LIST_LENGTH: Final = 500
RECENT_S: Final = 86_400.0
RECENT_RATIO: Final = 0.1
GROWTH_BOUNDS: Final = (0.5, 3.0)
GROWTH_PRIOR: Final = 5.0
REGION_MIN_WATCHES: Final = 200
MAX_WATCHES_PER_VIEWER: Final = 100
MIN_SHARED_VIEWERS: Final = 2
COSINE_SHRINK: Final = 5.0
_BLOCK: Final = 4096


@dataclass(frozen=True)
class LongWatches:
    """Long watches of servable videos, ascending in time; ``row`` is a row of ``videos.arrow``."""

    viewer: I64
    row: I64
    time_s: F64
    region: NDArray[np.object_]  # region, or None
    now_s: float  # time of the last impression
    recent_from_s: float

    @classmethod
    def from_labels(cls, labels: pa.Table, viewers: pa.Table, video_id: I64) -> LongWatches:
        """Selects the long watches of the labelled impressions.

        The recent period is the last ``RECENT_S``, or the last ``RECENT_RATIO`` of the impressions if these go further
        back.

        Args:
            labels: ``labels.parquet`` with viewer_id, video_id, event_time, long_watch.
            viewers: table with viewer_id and region.
            video_id: servable videos, ascending ``[N]``.

        Raises:
            EmptyDatasetError: if there are no impressions.
        """
        if not labels.num_rows:
            raise EmptyDatasetError(
                "no impressions to rank videos by; run `reelway features` on a data set with impressions"
            )
        time_s = labels["event_time"].cast(pa.int64()).to_numpy() / 1e6
        now_s = float(time_s.max())
        recent_from_s = min(now_s - RECENT_S, float(np.quantile(time_s, 1.0 - RECENT_RATIO)))
        videos = labels["video_id"].to_numpy()
        row = np.minimum(np.searchsorted(video_id, videos), len(video_id) - 1)
        selected = np.flatnonzero((labels["long_watch"].to_numpy() > 0) & (video_id[row] == videos))
        selected = selected[np.argsort(time_s[selected], kind="stable")]
        viewer = labels["viewer_id"].to_numpy()[selected]
        viewer_row = pc.index_in(pa.array(viewer), viewers["viewer_id"].combine_chunks())
        region = viewers["region"].cast(pa.string()).combine_chunks().take(viewer_row).to_numpy(zero_copy_only=False)
        return cls(viewer, row[selected], time_s[selected], region, now_s, recent_from_s)


@dataclass(frozen=True)
class RankedVideos:
    """One list of ``popular.arrow``: rows of ``videos.arrow`` with their scores, best first."""

    rows: I64
    scores: F32


def write_arrow(path: Path, columns: list[pa.Array], schema: pa.Schema) -> None:
    """Writes one uncompressed record batch, which can be memory-mapped."""
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def write_videos(
    path: Path, snapshot: pa.Table, videos: VideoArrays, embedding_ND: F32, dimensions: FeatureDimensions
) -> None:
    """Writes ``videos.arrow``.

    Args:
        snapshot: one row per video, ascending ``video_id``, from ``video_snapshot``.
        videos: model inputs of the same rows.
        embedding_ND: unit-length embeddings of the same rows.
        dimensions: recorded in the file's schema.

    Raises:
        ReleaseError: if ids do not ascend, or an embedding is not of unit length.
    """
    video_id = snapshot["video_id"].to_numpy()
    if len(video_id) > 1 and not (np.diff(video_id) > 0).all():
        raise ReleaseError("the video snapshot does not ascend in video_id; nothing was written")
    length_N = np.linalg.norm(embedding_ND, axis=1)
    if not (np.abs(length_N - 1.0) < 1e-3).all():
        worst = int(np.argmax(np.nan_to_num(np.abs(length_N - 1.0), nan=np.inf)))
        raise ReleaseError(
            f"video {video_id[worst]} has an embedding of length {length_N[worst]:g}, expected 1; train again"
        )
    columns = video_columns(snapshot, videos, embedding_ND)
    write_arrow(path, columns, with_dimensions(videos_schema(embedding_ND.shape[1]), dimensions))


def video_columns(snapshot: pa.Table, videos: VideoArrays, embedding_ND: F32) -> list[pa.Array]:
    """Returns the columns of ``videos_schema``: rows of ``videos.arrow``, or rows that the overlay adds to it.

    Args:
        snapshot: one row per video with ``title`` and the fields of the view ``video_content``.
        videos: model inputs of the same rows.
        embedding_ND: embeddings of the same rows.
    """
    static = len(VIDEO_STATIC_DENSE)
    live_dense = videos.video_dense[:, static:-1]  # columns between the static ones and hours_since_upload
    return [
        snapshot["video_id"].cast(pa.int64()).combine_chunks(),
        _filled(snapshot["creator_id"], -1, pa.int64()),
        _filled(snapshot["topic"], -1, pa.int32()),
        _filled(snapshot["uploaded_at_s"], float("nan"), pa.float64()),
        snapshot["title"].cast(pa.string()).combine_chunks(),
        _lists(videos.creator_codes, pa.int64()),
        _lists(videos.video_categories, pa.int64()),
        _lists(videos.video_static_dense, pa.float32()),
        _lists(live_dense, pa.float32()),
        _lists(embedding_ND, pa.float32()),
    ]


def popular_lists(watches: LongWatches, videos: int) -> dict[str, RankedVideos]:
    """Returns ``popular`` (all long watches), ``trending``, and ``trending:<region>`` for regions with enough watches.

    The trending score is the number of recent long watches times the growth: the video's share of recent watches
    relative to its share before. ``GROWTH_BOUNDS`` limits the growth, so that old favourites stay and a video with
    three watches does not lead.
    """
    lists = {
        "popular": _ranked(np.bincount(watches.row, minlength=videos).astype(np.float64)),
        "trending": _ranked(_trend(watches, np.ones(len(watches.row), dtype=np.bool_), videos)),
    }
    regions, counts = np.unique(watches.region[watches.region != None].astype(str), return_counts=True)  # noqa: E711
    for region in regions[counts >= REGION_MIN_WATCHES]:
        lists[f"trending:{region}"] = _ranked(_trend(watches, watches.region == region, videos))
    return lists


def write_popular(path: Path, video_id: I64, lists: Mapping[str, RankedVideos]) -> None:
    """Writes ``popular.arrow``: list after list, each best first."""
    names = np.repeat(list(lists), [len(ranked.rows) for ranked in lists.values()])
    rank = np.concatenate([np.arange(len(ranked.rows)) for ranked in lists.values()])
    rows = np.concatenate([ranked.rows for ranked in lists.values()])
    scores = np.concatenate([ranked.scores for ranked in lists.values()])
    columns = [
        pa.array(names.tolist(), pa.string()),
        pa.array(rank, pa.int32()),
        pa.array(video_id[rows], pa.int64()),
        pa.array(scores, pa.float32()),
    ]
    write_arrow(path, columns, POPULAR_SCHEMA)


def neighbours(embedding_ND: F32, index: faiss.Index, watches: LongWatches) -> NDArray[np.int32]:
    """Returns the most similar videos of each video, ``[N, NEIGHBOURS]``, best first, padded with -1.

    Videos watched by the same viewers come first (cosine of the viewer sets, shrunk towards 0 for few shared viewers).
    Nearest neighbours by embedding follow.
    """
    videos = len(embedding_ND)
    by_watch = _co_watched_pairs(watches, videos)
    similarity, near = index.search(np.ascontiguousarray(embedding_ND), min(NEIGHBOURS_PER_VIDEO + 1, videos))
    by_content = (np.repeat(np.arange(videos), near.shape[1]), near.ravel(), similarity.ravel())
    of, neighbour, score = (
        np.concatenate([watch, content]) for watch, content in zip(by_watch, by_content, strict=True)
    )
    valid = (neighbour >= 0) & (neighbour != of)
    return _top_neighbours(of[valid], neighbour[valid], score[valid], videos)


def write_neighbours(path: Path, video_id: I64, rows_NK: NDArray[np.int32]) -> None:
    """Writes ``neighbours.arrow``, in the order of ``videos.arrow``."""
    write_arrow(path, [pa.array(video_id, pa.int64()), _lists(rows_NK, pa.int32())], NEIGHBOURS_SCHEMA)


def _trend(watches: LongWatches, chosen: NDArray[np.bool_], videos: int) -> F64:
    late = watches.time_s >= watches.recent_from_s
    recent = np.bincount(watches.row[chosen & late], minlength=videos).astype(np.float64)
    before = np.bincount(watches.row[chosen & ~late], minlength=videos).astype(np.float64)
    expected = before * (recent.sum() / max(before.sum(), 1.0))
    growth = np.clip((recent + GROWTH_PRIOR) / (expected + GROWTH_PRIOR), *GROWTH_BOUNDS)
    return np.asarray(recent * growth)


def _ranked(score_N: F64) -> RankedVideos:
    """Returns the best videos first, equal scores by row; videos with score 0 are left out."""
    order = np.argsort(-score_N, kind="stable")[:LIST_LENGTH]
    order = order[score_N[order] > 0]
    return RankedVideos(order.astype(np.int64), score_N[order].astype(np.float32))


def _co_watched_pairs(watches: LongWatches, videos: int) -> tuple[I64, I64, F32]:
    """Returns pairs with at least ``MIN_SHARED_VIEWERS``, scored 2..3 so that they precede any similarity."""
    if not len(watches.row):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    viewer = np.unique(watches.viewer, return_inverse=True)[1]
    latest = _latest_per_viewer(viewer)
    ones = np.ones(len(latest), dtype=np.float32)
    watched = sparse.csr_matrix((ones, (watches.row[latest], viewer[latest])), shape=(videos, viewer.max() + 1))
    watched.data[:] = 1.0  # a video watched twice by one viewer counts once
    count_N = np.asarray(watched.sum(axis=1)).ravel()
    parts: list[tuple[I64, I64, F32]] = []
    for start in range(0, videos, _BLOCK):
        shared = (watched[start : start + _BLOCK] @ watched.T).tocoo()
        of, neighbour = shared.row.astype(np.int64) + start, shared.col.astype(np.int64)
        enough = (shared.data >= MIN_SHARED_VIEWERS) & (of != neighbour)
        of, neighbour, both = of[enough], neighbour[enough], shared.data[enough]
        score = both / (np.sqrt(count_N[of] * count_N[neighbour]) + COSINE_SHRINK)
        parts.append((of, neighbour, (2.0 + score).astype(np.float32)))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def _latest_per_viewer(viewer: I64) -> I64:
    """Returns the indices of each viewer's last ``MAX_WATCHES_PER_VIEWER`` watches, to limit the number of pairs."""
    order = np.argsort(viewer, kind="stable")
    ends = np.searchsorted(viewer[order], viewer[order], side="right")
    return np.asarray(order[ends - np.arange(len(order)) <= MAX_WATCHES_PER_VIEWER])


def _top_neighbours(of: I64, neighbour: I64, score: F32, videos: int) -> NDArray[np.int32]:
    """Returns the top ``NEIGHBOURS_PER_VIDEO`` of each ``of``; a repeated pair counts with its better score."""
    order = np.lexsort((neighbour, -score, of))
    of, neighbour = of[order], neighbour[order]
    first = np.zeros(len(of), dtype=np.bool_)
    first[np.unique(of * videos + neighbour, return_index=True)[1]] = True
    of, neighbour = of[first], neighbour[first]
    rank = np.arange(len(of)) - np.searchsorted(of, of, side="left")
    selected = rank < NEIGHBOURS_PER_VIDEO
    rows_NK = np.full((videos, NEIGHBOURS_PER_VIDEO), -1, dtype=np.int32)
    rows_NK[of[selected], rank[selected]] = neighbour[selected]
    return rows_NK


def _lists(matrix: NDArray[Any], kind: pa.DataType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _filled(column: pa.ChunkedArray, missing: float, kind: pa.DataType) -> pa.Array:
    return pc.fill_null(column.cast(kind), pa.scalar(missing, kind)).combine_chunks()
