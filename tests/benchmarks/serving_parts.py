"""Measures the parts of the request path separately, each on one core against its bar.

All parts run in the calling process, without Ray and HTTP. Parts that are compared are measured in turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import onnxruntime
import psutil
import torch
from numpy.typing import NDArray
from tests.benchmarks.catalogue import make_catalogue
from tests.benchmarks.serving_fixture import ServingFixture, store_candidates, video_rows
from tests.benchmarks.serving_release import RANKER, TOWER, TRIED, make_realistic_release
from tests.benchmarks.serving_variants import floor_of
from tests.support.bench_results import Row
from tests.support.dimensions import DIMENSIONS
from tests.support.release_files import NOW_S

from reelway.pipelines import search_index
from reelway.pipelines.models.ranker import Ranker
from reelway.pipelines.training.export import export_ranker
from reelway.platform.cli.terminal import print_status
from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.manifest import INDEX_FILE, RANKER_FILE
from reelway.platform.features.feast_store import open_feature_store
from reelway.serving.stages.arrays import ViewerQuery
from reelway.serving.stages.sources import AnnSource, SourceQuery
from reelway.serving.video_table import VideoTable

CANDIDATES: Final = 500
_EMPTY: Final[Any] = None


def median_ms(
    *calls: Callable[[int], object], times: int = 200, before: Callable[[int], object] | None = None
) -> list[float]:
    """Returns the median milliseconds of each call. The calls are made in turns, with the number of the turn.

    Args:
        before: called before each call and not measured.
    """
    taken = np.empty((len(calls), times))
    for i in range(-10, times):
        for k, call in enumerate(calls):
            if before:
                before(i)
            start = time.perf_counter()
            call(i)
            taken[k, i] = time.perf_counter() - start
    return [float(value) for value in 1000 * np.median(taken, axis=1)]


def measure_retrieval(fixture: ServingFixture) -> list[Row]:
    """Measures recall and time of a release's index on one core, for viewers that it was not tuned with."""
    print_status("retrieval: recall and time of the index")
    faiss.omp_set_num_threads(1)
    path = fixture.release_folder / INDEX_FILE
    embedding = fixture.loader().table().embedding
    videos = len(embedding)
    viewers = make_catalogue(videos, viewers=4 * TRIED).viewers  # the index was tuned with the first of them
    tune, judge = viewers[:TRIED], viewers[TRIED:]
    exact = search_index.exact_neighbours(embedding, judge, CANDIDATES)
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    queries = [SourceQuery(_cold_start_query(), viewer[None], CANDIDATES) for viewer in judge]
    rows = []
    for least, bar_ms in ((0.99, 2.0), (0.95, None)):
        if bar_ms is None:
            search_index.tune_probes(index, embedding, tune, CANDIDATES, least)
        source = AnnSource(index, embedding)
        (p50,) = median_ms(lambda i, source=source: source.propose(queries[i % len(queries)]), times=300)
        recall = search_index.recall_of(index, embedding, judge, exact)
        inverted = faiss.try_extract_index_ivf(index)
        of = f"{videos:,} videos, {inverted.nprobe if inverted else 'no'} lists, tuned to {least}"
        rows += [
            Row(f"retrieval, {of}: recall@{CANDIDATES}", recall, "", f">= {least}", recall >= least),
            _bar(f"retrieval, {of}: p50, one core", p50, "ms", bar_ms),
        ]
    per_video = path.stat().st_size / videos
    rows.append(Row("index: bytes a video", per_video, "B", "< 80", per_video < 80))
    return rows


def _cold_start_query() -> ViewerQuery:
    none = np.empty(0, np.int32)
    return ViewerQuery(_EMPTY, none, np.empty(0, np.float32), None, NOW_S, 0)


def measure_features(fixture: ServingFixture, *, with_store: bool) -> list[Row]:
    """Measures the gather of 500 videos, some of them overlaid, beside reading them from the online store.

    Args:
        with_store: whether the online store can hold features of videos.
    """
    print_status("features: the gather beside the online store")
    table = fixture.loader().table()
    rng = np.random.default_rng(5)
    fresh = np.sort(rng.choice(len(table), min(20_000, len(table)), replace=False)).astype(np.int32)
    live = rng.gamma(1.0, 2.0, (len(fresh), len(names.VIDEO_LIVE_DENSE))).astype(np.float32)
    table.overlay(fresh, live)
    sets = [rng.choice(len(table), CANDIDATES, replace=False).astype(np.int32) for _ in range(50)]
    (gather_ms,) = median_ms(lambda i: table.gather(sets[i % len(sets)], NOW_S), times=500)
    width = len(names.VIDEO_DENSE) + len(names.VIDEO_CATEGORIES) + names.ID_HASHES + table.embedding.shape[1]
    gather = _bar(f"features: gather of {CANDIDATES} x {width}, with live overlay, p50", gather_ms, "ms", 0.2)
    if not with_store:
        return [gather]
    rows_of_request = sets[0]
    store_candidates(fixture, rows_of_request, time.time(), table)
    from tests.benchmarks.serving_naive import VIDEO_FIELDS, read_videos

    store = open_feature_store(fixture.features)
    ids = table.video_id[rows_of_request].tolist()
    (store_ms,) = median_ms(lambda _: read_videos(store, ids), times=20)
    same = _same(read_videos(store, ids).to_pydict(), video_rows(table, rows_of_request), VIDEO_FIELDS)
    ratio = store_ms / gather_ms
    return [
        gather,
        Row("features: the same videos from the online store, p50", store_ms, "ms"),
        Row("features: online store over gather", ratio, "x", ">= 100", ratio >= 100),
        Row("features: values that are the same on both ways", 100 * same, "%", "100", same == 1.0),
    ]


def _same(read: dict[str, list[Any]], expected: Sequence[dict[str, Any]], fields: Sequence[str]) -> float:
    same = total = 0
    for name in fields:
        for value, row in zip(read[name], expected, strict=True):
            total += 1
            expected_value = row.get(name)
            if value is None or expected_value is None:
                same += value is None and expected_value is None
            else:
                is_text = isinstance(expected_value, str)
                same += value == expected_value if is_text else np.float32(value) == np.float32(expected_value)
    return same / total


def measure_ranking(fixture: ServingFixture) -> list[Row]:
    """Measures the release's ranker on 500 candidates beside torch in eager mode, in two ways.

    First with consecutive calls, which find the weights in the core's cache. Then with each call after a complete slate
    for another viewer, as in a service.
    """
    print_status("ranking: 500 candidates beside torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = fixture.loader().table()
    ranker = Ranker(RANKER, TOWER.dim, DIMENSIONS).eval()
    with torch.no_grad():  # away from the initial values, as after training
        for parameter in ranker.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    inputs = _ranker_inputs(fixture, table)
    export_ranker(ranker, fixture.path / RANKER_FILE, inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(fixture.path / RANKER_FILE), options, providers=["CPUExecutionProvider"])
    tensors = [torch.from_numpy(np.array(inputs[name])) for name in names.RANKER_INPUTS]

    def eager(_: int) -> NDArray[np.float32]:
        with torch.inference_mode():
            outputs: NDArray[np.float32] = ranker(*tensors).numpy()
        return outputs

    def graph(_: int) -> NDArray[np.float32]:
        outputs: NDArray[np.float32] = session.run(None, inputs)[0]
        return outputs

    graph_ms, torch_ms = median_ms(graph, eager, times=300)
    slate = floor_of(fixture, from_store=False)
    graph_served_ms, torch_served_ms = median_ms(graph, eager, times=300, before=slate)
    onnx_outputs, torch_outputs = graph(0), eager(0)
    difference = float(np.abs(onnx_outputs - torch_outputs).max())
    lost = 100 * max(1 - _ndcg(onnx_outputs[:, k], torch_outputs[:, k]) for k in range(torch_outputs.shape[1]))
    share, share_served = graph_ms / torch_ms, graph_served_ms / torch_served_ms
    return [
        Row("ranking: torch, eager, one core, p50", torch_ms, "ms"),
        Row("ranking: the release's graph, one core, p50", graph_ms, "ms"),
        Row("ranking: graph over torch, one after the other", share, "x", "<= 0.5", share <= 0.5),
        Row("ranking: the release's graph, each after a slate, p50", graph_served_ms, "ms"),
        Row("ranking: graph over torch, each after a slate", share_served, "x", "<= 0.5", share_served <= 0.5),
        Row("ranking: largest difference, nothing is quantised", difference, "", "<= 1e-5", difference <= 1e-5),
        Row("ranking: NDCG lost to torch's order, the worst head", lost, "%", "< 0.1", lost < 0.1),
    ]


def _ndcg(scores_C: NDArray[np.float32], gains_C: NDArray[np.float32]) -> float:
    """Returns the NDCG of the order by ``scores_C``, with torch's ranks as gains."""
    gain = np.argsort(np.argsort(gains_C)) / len(gains_C)
    discount = 1 / np.log2(2 + np.arange(len(gain)))
    return float((gain[np.argsort(-scores_C)] * discount).sum() / (np.sort(gain)[::-1] * discount).sum())


def _ranker_inputs(fixture: ServingFixture, table: VideoTable) -> dict[str, NDArray[Any]]:
    from reelway.platform.contracts.api import RequestContext
    from reelway.serving.viewer_query import viewer_query

    viewer = viewer_query(fixture.viewer_rows()[0], RequestContext(), NOW_S, table, seed=0).arrays
    rows = np.arange(CANDIDATES, dtype=np.int32)
    return {
        "viewer_dense": viewer.viewer_dense,
        "viewer_categories": viewer.viewer_categories,
        "viewer_embedding": table.embedding[:1],
        **table.gather(rows, NOW_S).as_inputs(),
    }


def measure_growth(path: Path, large: ServingFixture, sizes: Sequence[int]) -> list[Row]:
    """Measures a slate in one process as the catalogue grows to ``large``, and the disk space per video."""
    fixtures = {}
    for videos in sizes:
        print_status(f"growth: a release of {videos:,} videos")
        fixtures[videos] = ServingFixture(path / f"catalogue-{videos}")
        make_realistic_release(fixtures[videos].release_folder, videos)
    fixtures[len(large.loader().table())] = large
    calls = [floor_of(fixture, from_store=False) for fixture in fixtures.values()]
    rows = []
    for videos, fixture in fixtures.items():
        files = fixture.release_folder.iterdir()
        mapped = sum(file.stat().st_size for file in files if file.suffix in (".arrow", ".faiss"))
        rows.append(Row(f"catalogue of {videos:,}: mapped bytes a video", mapped / videos, "B"))
    p50 = dict(zip(fixtures, median_ms(*calls, times=200), strict=True))
    rows += [Row(f"catalogue of {videos:,}: slate in one process, p50", ms, "ms") for videos, ms in p50.items()]
    smallest, largest = min(p50), max(p50)
    growth = max(p50.values()) / p50[smallest]
    name = f"catalogue: slowest p50 over that of {smallest:,}, up to {largest:,}"
    return [*rows, Row(name, growth, "x", "< 1.5", growth < 1.5)]


def measure_cold_start(fixture: ServingFixture) -> list[Row]:
    """Measures the cold start of two replicas, one after the other, and the memory that they share."""
    videos = len(fixture.loader().table())
    print_status(f"cold start with {videos:,} videos")
    command = [sys.executable, "-m", "tests.benchmarks.serving_replica", str(fixture.path), fixture.release]
    subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True
    )  # fetches the release into the cache
    replicas: list[subprocess.Popen[str]] = []
    started = []
    try:
        for _ in range(2):
            replicas.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            started.append(json.loads(replicas[-1].stdout.readline()))  # type: ignore[union-attr]
        own_mb = max(psutil.Process(one.pid).memory_full_info().uss for one in replicas) / 1e6
        maps = [_release_maps(one.pid, fixture.path / "cache") for one in replicas]
    finally:
        for one in replicas:
            one.communicate()
    if not all(one["whole"] for one in started):
        raise SystemExit("cold start: the first slate is degraded; the times would mean nothing")
    slowest = max(started, key=lambda one: float(one["seconds"]))
    once = sum(pss for _, pss in maps) / max(sum(rss for rss, _ in maps), 1)
    return [
        Row(f"cold start, {videos:,} videos: process to first slate", slowest["seconds"], "s", "< 10 s",
            slowest["seconds"] < 10),
        Row("cold start: of that, imports", slowest["imports_s"], "s"),
        Row("cold start: memory that is a replica's own", own_mb, "MB"),
        Row("cold start: pages of the release in a replica", maps[0][0] / 1e6, "MB"),
        Row("cold start: pages in memory over pages in two replicas", 100 * once, "%", "< 55: shared", once < 0.55),
    ]  # fmt: skip


def _release_maps(pid: int, folder: Path) -> tuple[int, int]:
    """Returns the bytes of the release's files that a process has mapped, and its proportional share (PSS)."""
    maps = [one for one in psutil.Process(pid).memory_maps() if one.path.startswith(str(folder))]
    return sum(one.rss for one in maps), sum(one.pss for one in maps)


def _bar(metric: str, value: float, unit: str, bar: float | None) -> Row:
    return Row(metric, value, unit) if bar is None else Row(metric, value, unit, f"< {bar:g} {unit}", value < bar)
