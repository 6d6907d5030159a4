"""Small event tables in the contract's schemas, generated from a seed, and builders for hand-written events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.support.dimensions import DIMENSIONS

from reelway.platform.contracts import events as contract
from reelway.platform.features.dimensions import write_dimensions

DAY_US = 86_400_000_000
START_US = 1_700_006_400_000_000  # midnight, UTC


def table(schema: pa.Schema, **columns: object) -> pa.Table:
    """Returns a table of ``schema``; nullable columns that are not given are null."""
    rows = len(next(iter(columns.values())))  # type: ignore[arg-type]
    arrays = []
    for field in schema:
        values = columns.get(field.name, [None] * rows)
        arrays.append(pa.array(values).cast(pa.int64()).cast(field.type) if pa.types.is_timestamp(field.type)
                      else pa.array(values, field.type))  # fmt: skip
    return pa.table(arrays, schema=schema)


def impressions(rows: list[tuple[int, int, int, int]], *, request: list[int] | None = None) -> pa.Table:
    """Builds impressions from (impression_id, viewer_id, video_id, time_us)."""
    ids, viewers, videos, times = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    n = len(rows)
    return table(
        contract.IMPRESSIONS, impression_id=ids, request_id=request or ids, viewer_id=viewers, video_id=videos,
        position=[0] * n, event_time=times, release=["none"] * n, arm=["stable"] * n, source=["popular"] * n,
        propensity=[0.5] * n, device=["phone"] * n,
    )  # fmt: skip


def outcomes(rows: list[tuple[int, str, float, int]]) -> pa.Table:
    """Builds outcomes from (impression_id, type, value, time_us)."""
    ids, kinds, values, times = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    n = len(rows)
    return table(
        contract.OUTCOMES, outcome_id=list(range(n)), impression_id=ids, viewer_id=[0] * n, video_id=[0] * n,
        type=kinds, value=values, event_time=times,
    )  # fmt: skip


def videos(ids: list[int], *, creator: int = 7, topic: int = 3, duration_ms: int = 20_000,
           uploaded_us: int = START_US - DAY_US) -> pa.Table:  # fmt: skip
    n = len(ids)
    return table(
        contract.VIDEOS, video_id=ids, creator_id=[creator] * n, uploaded_at=[uploaded_us] * n,
        duration_ms=[duration_ms] * n, topic=[topic] * n, language=["en"] * n, title=[f"video {i}" for i in ids],
    )  # fmt: skip


def random_dataset(
    *, viewers: int = 40, creators: int = 8, video_count: int = 60, requests: int = 400, slate: int = 5,
    days: int = 12, seed: int = 0,
) -> dict[str, pa.Table]:  # fmt: skip
    """Returns a consistent random data set of ``requests * slate`` impressions over ``days``."""
    rng = np.random.default_rng(seed)
    n = requests * slate
    embeddings = {
        "visual": DIMENSIONS.visual,
        "audio": DIMENSIONS.audio,
        "text": DIMENSIONS.text,
    }
    uploaded = START_US - rng.integers(0, 5 * DAY_US, video_count)
    video_table = table(
        contract.VIDEOS, video_id=np.arange(video_count) + 1000, creator_id=rng.integers(0, creators, video_count),
        uploaded_at=uploaded, duration_ms=rng.integers(5_000, 60_000, video_count),
        topic=rng.integers(-1, DIMENSIONS.topics, video_count), language=rng.choice(["en", "de"], video_count).tolist(),
        title=[f"video {i}" for i in range(video_count)],
        **{name: [None if rng.random() < 0.2 else rng.normal(size=d).astype(np.float32) for _ in range(video_count)]
           for name, d in embeddings.items()},
    )  # fmt: skip
    request_us = np.sort(START_US + rng.integers(0, days * DAY_US, requests) // 1000 * 1000)
    viewer = np.repeat(rng.integers(0, viewers, requests) + 500, slate)
    video = (rng.zipf(1.5, n) % video_count) + 1000
    impression_us = np.repeat(request_us, slate)
    impression_table = table(
        contract.IMPRESSIONS, impression_id=np.arange(n) + 10_000, request_id=np.repeat(np.arange(requests), slate),
        viewer_id=viewer, video_id=video, position=np.tile(np.arange(slate), requests), event_time=impression_us,
        release=["none"] * n, arm=["stable"] * n, source=rng.choice(["ann", "popular"], n).tolist(),
        propensity=np.full(n, 0.25), device=rng.choice(["phone", "tv"], n).tolist(),
    )  # fmt: skip
    kinds, owner = [], []
    for kind, rate in [("watch", 0.9), ("like", 0.2), ("share", 0.05), ("save", 0.05), ("follow", 0.05),
                       ("comment", 0.03), ("skip", 0.3), ("not_interested", 0.02), ("report", 0.005)]:  # fmt: skip
        hit = np.flatnonzero(rng.random(n) < rate)
        owner.append(hit)
        kinds += [kind] * len(hit)
    rows = np.concatenate(owner)
    outcome_us = impression_us[rows] + rng.integers(0, 90_000_000, len(rows))
    value = np.where(np.array(kinds) == "watch", rng.integers(0, 60_000, len(rows)), 1)
    order = np.argsort(outcome_us, kind="stable")
    outcome_table = table(
        contract.OUTCOMES, outcome_id=np.arange(len(rows)), impression_id=(rows + 10_000)[order],
        viewer_id=viewer[rows][order], video_id=video[rows][order], type=np.array(kinds)[order].tolist(),
        value=value[order], event_time=outcome_us[order],
    )  # fmt: skip
    return {
        "viewers": table(
            contract.VIEWERS, viewer_id=np.arange(viewers) + 500, region=rng.choice(["eu", "us"], viewers).tolist(),
            created_at=START_US - rng.integers(0, DAY_US, viewers), language=["en"] * viewers,
        ),
        "creators": table(
            contract.CREATORS, creator_id=np.arange(creators), created_at=[START_US - 6 * DAY_US] * creators,
            followers=rng.integers(0, 1000, creators),
        ),
        "videos": video_table,
        "impressions": impression_table,
        "outcomes": outcome_table,
    }  # fmt: skip


def write_dataset(folder: Path, tables: dict[str, pa.Table]) -> Path:
    """As ``<folder>/<table>.parquet``, with ``schema.json``."""
    write_dimensions(folder, DIMENSIONS)
    for name, content in tables.items():
        pq.write_table(content, folder / f"{name}.parquet")
    return folder
