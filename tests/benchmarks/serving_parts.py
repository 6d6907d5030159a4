"""The parts of the request path one by one, each on one core against what it is held to.

Everything is measured in the process that calls: no Ray, no HTTP. Two things that are compared are measured in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from tests.benchmarks.catalogue import make_catalogue
from tests.benchmarks.report import Row
from tests.benchmarks.serving_place import Place, store_candidates, video_rows
from tests.benchmarks.serving_release import RANKER, TOWER, make_realistic_release
from tests.release_files import NOW_S

from reelway.pipelines import search_index
from reelway.pipelines.models.ranker import Ranker
from reelway.pipelines.training.export import export_ranker
from reelway.platform.cli.terminal import say
from reelway.platform.contracts import features as names
from reelway.platform.contracts.manifest import RANKER_FILE
from reelway.platform.features.store import open_feature_store
from reelway.serving.stages.arrays import ViewerQuery
from reelway.serving.stages.sources import AnnSource, Ask
from reelway.serving.video_table import VideoTable

CANDIDATES: Final = 500
_EMPTY: Final[Any] = None


def median_ms(*calls: Callable[[int], object], times: int = 200) -> list[float]:
    """Median milliseconds of each call, in turns; each is called with the number of the turn."""
    taken = np.empty((len(calls), times))
    for i in range(-10, times):
        for k, call in enumerate(calls):
            start = time.perf_counter()
            call(i)
            taken[k, i] = time.perf_counter() - start
    return [float(one) for one in 1000 * np.median(taken, axis=1)]


def measure_retrieval(place: Path, videos: int) -> list[Row]:
    """Recall and time of the index that the release builder makes, on one core."""
    faiss.omp_set_num_threads(1)
    say(f"retrieval: an index of {videos} videos")
    catalogue = make_catalogue(videos, viewers=200)
    tune, judge = catalogue.viewers[:64], catalogue.viewers[64:]
    start = time.perf_counter()
    index = search_index.make_index(catalogue.videos)
    took_s = time.perf_counter() - start
    path = place / "large.faiss"
    rows = [Row("index: time to build", took_s, "s")]
    exact = search_index.exact_rows(catalogue.videos, judge, CANDIDATES)
    for recall, bars in ((0.992, (0.99, 2.0)), (0.955, (0.95, None))):
        search_index.tune_probes(index, catalogue.videos, tune, CANDIDATES, recall)
        search_index.write_index(path, index)
        mapped = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        source = AnnSource(mapped, catalogue.videos)
        asks = [Ask(_nobody(), viewer[None], CANDIDATES) for viewer in judge]
        (p50,) = median_ms(lambda i, asks=asks, source=source: source.propose(asks[i % len(asks)]), times=300)
        seen = search_index.recall_of(mapped, catalogue.videos, judge, exact)
        probes = faiss.extract_index_ivf(mapped).nprobe
        of = f"{videos:,} videos, {probes} lists"
        rows += [
            Row(f"retrieval, {of}: recall@{CANDIDATES}", seen, "", f">= {bars[0]}", seen >= bars[0]),
            _bar(f"retrieval, {of}: p50, one core", p50, "ms", bars[1]),
        ]
    per_video = path.stat().st_size / videos
    rows.append(Row("index: bytes a video", per_video, "B", "< 80", per_video < 80))
    return rows


def _nobody() -> ViewerQuery:
    none = np.empty(0, np.int32)
    return ViewerQuery(_EMPTY, none, np.empty(0, np.float32), None, NOW_S, 0)


def measure_features(place: Place) -> list[Row]:
    """The gather of 500 videos, some of them fresher than the release, beside reading them from the online store."""
    say("features: the gather beside the online store")
    table = place.loader().table()
    rng = np.random.default_rng(5)
    fresh = np.sort(rng.choice(len(table), min(20_000, len(table)), replace=False)).astype(np.int32)
    live = rng.gamma(1.0, 2.0, (len(fresh), len(names.VIDEO_LIVE_DENSE))).astype(np.float32)
    table.overlay(fresh, live)
    sets = [rng.choice(len(table), CANDIDATES, replace=False).astype(np.int32) for _ in range(50)]
    (gather_ms,) = median_ms(lambda i: table.gather(sets[i % len(sets)], NOW_S), times=500)
    asked = sets[0]
    store_candidates(place, asked, time.time(), table)
    from tests.benchmarks.serving_naive import VIDEO_FIELDS, read_videos

    store = open_feature_store(place.features)
    ids = table.video_id[asked].tolist()
    (store_ms,) = median_ms(lambda _: read_videos(store, ids), times=20)
    same = _same(read_videos(store, ids).to_pydict(), video_rows(table, asked), VIDEO_FIELDS)
    width = len(names.VIDEO_DENSE) + len(names.VIDEO_CATEGORIES) + names.ID_HASHES + table.embedding.shape[1]
    ratio = store_ms / gather_ms
    return [
        _bar(f"features: gather of {CANDIDATES} x {width}, with live overlay, p50", gather_ms, "ms", 0.2),
        Row("features: the same videos from the online store, p50", store_ms, "ms"),
        Row("features: online store over gather", ratio, "x", ">= 100", ratio >= 100),
        Row("features: values that are the same on both ways", 100 * same, "%", "100", same == 1.0),
    ]


def _same(read: dict[str, list[Any]], expected: Sequence[dict[str, Any]], fields: Sequence[str]) -> float:
    same = total = 0
    for name in fields:
        for seen, row in zip(read[name], expected, strict=True):
            total += 1
            wanted = row.get(name)
            if seen is None or wanted is None:
                same += seen is None and wanted is None
            else:
                same += seen == wanted if isinstance(wanted, str) else np.float32(seen) == np.float32(wanted)
    return same / total


def measure_ranking(place: Place) -> list[Row]:
    """The ranker of the release on 500 candidates beside torch, eager, and beside torch's own form of the graph."""
    say("ranking: 500 candidates beside torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = place.loader().table()
    ranker = Ranker(RANKER, TOWER.dim).eval()
    inputs = _ranker_inputs(place, table)
    export_ranker(ranker, place.path / RANKER_FILE, inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(place.path / RANKER_FILE), options, providers=["CPUExecutionProvider"])
    given = [torch.from_numpy(inputs[name]) for name in names.RANKER_INPUTS]

    def eager(_: int) -> NDArray[np.float32]:
        with torch.inference_mode():
            outputs: NDArray[np.float32] = ranker(*given).numpy()
        return outputs

    ours_ms, torch_ms = median_ms(lambda _: session.run(None, inputs), eager, times=300)
    difference = float(np.abs(session.run(None, inputs)[0] - eager(0)).max())
    share = ours_ms / torch_ms
    return [
        Row("ranking: torch, eager, one core, p50", torch_ms, "ms"),
        Row("ranking: the release's graph, one core, p50", ours_ms, "ms"),
        Row("ranking: graph over torch", share, "x", "<= 0.5", share <= 0.5),
        Row("ranking: largest difference, nothing is quantised", difference, "", "<= 1e-5", difference <= 1e-5),
    ]


def _ranker_inputs(place: Place, table: VideoTable) -> dict[str, NDArray[Any]]:
    from reelway.platform.contracts.api import RequestContext
    from reelway.serving.viewers import viewer_query

    viewer = viewer_query(place.viewer_rows()[0], RequestContext(), NOW_S, table, seed=0).arrays
    rows = np.arange(CANDIDATES, dtype=np.int32)
    return {
        "viewer_dense": viewer.viewer_dense,
        "viewer_categories": viewer.viewer_categories,
        "viewer_embedding": table.embedding[:1],
        **table.gather(rows, NOW_S).as_inputs(),
    }


def measure_growth(path: Path, sizes: Sequence[int]) -> list[Row]:
    """One slate in one process as the catalogue grows, and what a video takes of the disk and of memory."""
    from tests.benchmarks.serving_sides import floor_of

    calls, rows = [], []
    for videos in sizes:
        say(f"catalogue: {videos} videos")
        place = Place(path / f"catalogue-{videos}")
        make_realistic_release(place.made, videos)
        calls.append(floor_of(place, from_store=False))
        bytes_each = sum(file.stat().st_size for file in place.made.iterdir() if file.suffix != ".onnx") / videos
        rows.append(Row(f"catalogue of {videos:,}: mapped bytes a video", bytes_each, "B"))
    p50 = median_ms(*calls, times=150)
    for videos, ms in zip(sizes, p50, strict=True):
        rows.append(Row(f"catalogue of {videos:,}: slate in one process, p50", ms, "ms"))
    growth = max(p50) / p50[0]
    rows.append(Row(f"catalogue: p50 of {sizes[-1]:,} over {sizes[0]:,}", growth, "x", "< 1.5", growth < 1.5))
    return rows


def _bar(metric: str, value: float, unit: str, bar: float | None) -> Row:
    return Row(metric, value, unit) if bar is None else Row(metric, value, unit, f"< {bar:g} {unit}", value < bar)
