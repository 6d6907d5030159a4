"""Measures which sources the videos of a slate come from, and what a least share of each source costs in watch time.

``python -m tests.benchmarks.bench_source_mix RUN [viewers]``. The run is simulated and has a release. Viewers of its
last day get one slate at the end of the data from the real stages, with their features at that time. The expected
watch time of a slate is known exactly, because the simulator states the probability that a viewer enjoys a video. The
expectation leaves out at which position a viewer stops.
"""

# Shapes: B viewers, S slate

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tests.support.bench_results import Row, write_report

from reelway.pipelines.features.training_rows import LABELS_FILE, viewer_snapshot
from reelway.pipelines.simulation.config import SimulationConfig
from reelway.pipelines.simulation.responses import expected_watch_ms
from reelway.pipelines.simulation.world import World
from reelway.platform.contracts.api import RequestContext
from reelway.platform.contracts.blend import Blend, RerankingSettings, RetrievalSettings
from reelway.platform.run_directory import RunDirectory
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import LocalStages, run_without_waiting
from reelway.serving.stages.arrays import SOURCES, RankingInput, ScoredCandidates, ViewerQuery
from reelway.serving.stages.reranking import Reranking
from reelway.serving.stages.retrieval import Retrieval
from reelway.serving.viewer_query import viewer_query

I64 = NDArray[np.int64]

ANN_FIRST = {"ann": 0.6, "trending": 0.15, "popular": 0.1, "neighbours": 0.1, "fresh": 0.05}
"""Quotas that give a video of several sources to the ANN source."""


@dataclass(frozen=True)
class Mix:
    """Slates of one blend: the mean watch time of an impression, and the sources of the videos."""

    watch_s: float
    sources: Counter[str]
    sources_per_slate: float


def slates_of(stages: LocalStages, queries: list[ViewerQuery], count: int) -> tuple[list[I64], list[list[str]]]:
    """Returns rows and sources of each viewer's slate."""
    rows, sources = [], []
    for query in queries:
        candidates = stages.retrieval.retrieve(query)
        value = run_without_waiting(stages.ranking.rank(RankingInput.of(query, candidates)))
        slate = stages.reranking.rerank(ScoredCandidates.of(query, candidates, value, count))
        rows.append(slate.rows.astype(np.int64))
        sources.append([SOURCES[code] for code in slate.source.tolist()])
    return rows, sources


def measure(run: RunDirectory, viewers: int, count: int) -> list[Row]:
    """Compares blends on the run's newest release."""
    built = [path for path in run.release_store.iterdir() if (path / "manifest.json").exists()]
    folder = max(built, key=lambda path: path.stat().st_mtime)
    loader = ReleaseLoader(folder)
    table, now_s = loader.table(), float(loader.router_release().videos_as_of_s or 0)
    world = World(SimulationConfig(), 0)
    labels = pq.read_table(run.features / LABELS_FILE, columns=["viewer_id"])
    chosen = np.unique(labels["viewer_id"].to_numpy()[-20 * viewers :])[:viewers]
    queries = viewer_queries(run, chosen, now_s, loader)
    retrieval, ranking = loader.retrieval(), loader.ranking()
    sources = dict(zip(Blend().retrieval.quotas, retrieval._sources, strict=True))
    default = Blend()
    blends = {
        "ann first, no least shares": (RetrievalSettings(quotas=ANN_FIRST), RerankingSettings(min_shares={})),
        "default quotas, no least shares": (default.retrieval, RerankingSettings(min_shares={})),
        "default": (default.retrieval, default.reranking),
    }
    report = []
    first = 0.0
    for name, (of_retrieval, of_reranking) in blends.items():
        stages = LocalStages(
            Retrieval(retrieval._tower, sources, of_retrieval, table), ranking, Reranking(table, of_reranking)
        )
        rows, used = slates_of(stages, queries, count)
        mix = judge(world, chosen, [table.video_id[of_slate] for of_slate in rows], used, now_s)
        first = first or mix.watch_s
        total = sum(mix.sources.values())
        shares = ", ".join(f"{source} {100 * n / total:.0f} %" for source, n in mix.sources.most_common())
        report += [
            Row(f"{count} videos, {name}: watch time", mix.watch_s, f"s per impression, x{mix.watch_s / first:.4f}"),
            Row(f"{count} videos, {name}: sources", mix.sources_per_slate, f"per slate; {shares}"),
        ]
    return report


def viewer_queries(run: RunDirectory, viewers: I64, now_s: float, loader: ReleaseLoader) -> list[ViewerQuery]:
    """Returns each viewer at the end of the data, with the creators of followed videos."""
    follows = followed_creators(run)
    rows: list[dict[str, Any]] = viewer_snapshot(run.features, viewers, now_s).to_pylist()
    queries = []
    for viewer, row in zip(viewers.tolist(), rows, strict=True):
        query = viewer_query(row, RequestContext(), now_s, loader.table(), seed=viewer)
        queries.append(replace(query, followed_creators=np.array(follows.get(viewer, []), dtype=np.int64)))
    return queries


def followed_creators(run: RunDirectory) -> dict[int, list[int]]:
    """Viewer -> creators of the videos that the viewer followed from, in the order of time."""
    outcomes = pq.read_table(run.dataset / "outcomes.parquet", columns=["viewer_id", "video_id", "type"])
    follows = outcomes.filter(pc.equal(outcomes["type"].cast("string"), "follow"))
    videos = pq.read_table(run.dataset / "videos.parquet", columns=["video_id", "creator_id"])
    creator = dict(zip(videos["video_id"].to_pylist(), videos["creator_id"].to_pylist(), strict=True))
    result: dict[int, list[int]] = {}
    for viewer, video in zip(follows["viewer_id"].to_pylist(), follows["video_id"].to_pylist(), strict=True):
        result.setdefault(viewer, []).append(creator[video])
    return result


def judge(world: World, viewers: I64, slates: list[I64], used: list[list[str]], now_s: float) -> Mix:
    """Returns the true mean watch time of the slates and their sources."""
    videos_BS = np.stack(slates)
    enjoy_BS = world.enjoyment(viewers, videos_BS, np.full(len(viewers), now_s))
    duration_BS = world.videos.duration_ms[videos_BS - 1].astype(np.float32)
    watch_s = float(expected_watch_ms(enjoy_BS, duration_BS).mean()) / 1000.0
    return Mix(watch_s, Counter(s for of_slate in used for s in of_slate), float(np.mean([len(set(s)) for s in used])))


def main(run: Path, viewers: int) -> None:
    rows = [row for count in (10, 20) for row in measure(RunDirectory(run), viewers, count)]
    write_report("source_mix", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500)
