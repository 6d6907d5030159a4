"""Training rows of a tiny world with a known next-video rule and known taste."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.support.dimensions import DIMENSIONS

from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.events import TIMESTAMP_TYPE

START_S = 1_700_000_000


def made_table(*, requests: int = 300, slate: int = 4, videos: int = 60, viewers: int = 25, seed: int = 0) -> pa.Table:
    """One row per impression. Long watches follow topic affinity; a viewer's next positive is ``last + 1``."""
    random = np.random.default_rng(seed)
    rows = requests * slate
    request = np.repeat(np.arange(requests), slate)
    viewer_of = random.integers(0, viewers, requests)
    request_time_s = (START_S + np.sort(random.integers(0, 30 * 86_400, requests))).astype(np.float64)
    topic_of = np.arange(videos) % DIMENSIONS.topics
    latest = random.integers(0, videos, requests)
    video = random.integers(0, videos, rows)
    first = np.arange(rows) % slate == 0
    video[first] = (latest[request[first]] + 1) % videos
    affinity_RT = random.dirichlet(np.full(DIMENSIONS.topics, 0.2), requests).astype(np.float32)
    chance = np.where(first, 0.9, 0.15 + 0.6 * affinity_RT[request, topic_of[video]])
    long_watch = (random.random(rows) < chance).astype(np.float32)
    lengths = random.integers(1, 8, requests)
    lengths[viewer_of == 0] = 0  # viewer 0 has no history
    history = [[*random.integers(0, videos, n - 1), latest[r]] if n else [] for r, n in enumerate(lengths)]
    columns: dict[str, pa.Array] = {
        "impression_id": pa.array(np.arange(rows)),
        "request_id": pa.array(request),
        "viewer_id": pa.array(viewer_of[request]),
        "video_id": pa.array(video),
        "creator_id": pa.array(video // 5),
        "event_time": pa.array((request_time_s[request] * 1e6).astype(np.int64)).cast(TIMESTAMP_TYPE),
        "request_time_s": pa.array(request_time_s[request]),
        "device": pa.array(np.where(viewer_of[request] % 2 == 0, "phone", "tv")),
        "position": pa.array((np.arange(rows) % slate).astype(np.int16)),
        "source": pa.array(["ann"] * rows),
        "propensity": pa.array(np.full(rows, 0.5, np.float32)),
        "weight": pa.array(long_watch - 0.5 * (1 - long_watch)),
        "long_watch": pa.array(long_watch),
        "watch_s": pa.array((5 + 20 * long_watch).astype(np.float32)),
        "skip": pa.array(1 - long_watch),
    }
    for task in ("like", "share", "save", "follow", "comment", "not_interested", "report"):
        columns[task] = pa.array((random.random(rows) < 0.1).astype(np.float32))
    columns |= _viewer_columns(random, request, viewer_of, request_time_s, history, affinity_RT)
    columns |= _video_columns(random, video, topic_of, videos)
    return pa.table(columns)


def _viewer_columns(random, request, viewer_of, request_time_s, history, affinity_RT):  # type: ignore[no-untyped-def]
    activity = random.gamma(2.0, 2.0, (len(viewer_of), len(names.VIEWER_ACTIVITY))).astype(np.float32)
    activity[viewer_of == 0] = np.nan
    times = [[float(request_time_s[r]) - 600.0 * (len(h) - i) for i in range(len(h))] for r, h in enumerate(history)]
    weights = [[1.0] * len(h) for h in history]
    return {
        "region": pa.array([["eu", "us", None][v % 3] for v in viewer_of[request]]),
        "language": pa.array([["en", "de"][v % 2] for v in viewer_of[request]]),
        "segment": pa.array([None] * len(request), pa.string()),
        "created_at_s": pa.array(np.full(len(request), START_S - 86_400.0)),
        **{name: pa.array(activity[request, i]) for i, name in enumerate(names.VIEWER_ACTIVITY)},
        "history_videos": pa.array([history[r] for r in request], pa.list_(pa.int64())),
        "history_weights": pa.array([weights[r] for r in request], pa.list_(pa.float32())),
        "history_times_s": pa.array([times[r] for r in request], pa.list_(pa.float64())),
        "topic_affinity": pa.array([affinity_RT[r] for r in request], pa.list_(pa.float32())),
    }


def _video_columns(random, video, topic_of, videos):  # type: ignore[no-untyped-def]
    content = {
        name: random.normal(size=(videos, width)).astype(np.float32)
        for name, width in (("visual", DIMENSIONS.visual), ("audio", DIMENSIONS.audio), ("text", DIMENSIONS.text))
    }
    live = random.gamma(2.0, 2.0, (len(video), len(names.VIDEO_LIVE_DENSE))).astype(np.float32)
    live[video == 1] = np.nan  # video 1 has no engagement and no content
    return {
        "topic": pa.array(np.where(video == 1, -1, topic_of[video])),
        "video_language": pa.array([["en", "de", None][v % 3] for v in video]),
        "duration_s": pa.array(np.where(video == 1, np.nan, 10.0 + video).astype(np.float32)),
        "uploaded_at_s": pa.array(np.full(len(video), START_S - 3600.0)),
        **{
            name: pa.array([None if v == 1 or (v + i) % 4 == 0 else matrix[v] for v in video], pa.list_(pa.float32()))
            for i, (name, matrix) in enumerate(content.items())
        },
        **{name: pa.array(live[:, i]) for i, name in enumerate(names.VIDEO_LIVE_DENSE)},
    }


def write_rows(path: Path, table: pa.Table) -> Path:
    """Writes the table as ``training_rows.parquet``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path
