"""Compares the rank server's output over gRPC and REST with the ranker in this process.

Viewers come from the online store, candidates from the release's retrieval, features from its video table. The rows are
therefore those that a service would score.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from tests.support.bench_results import Row
from tests.support.serving.rank_server import RankServerProcess

from reelway.platform.contracts.api import RecommendRequest, RequestContext
from reelway.platform.contracts.feature_names import RANKER_INPUTS
from reelway.platform.contracts.manifest import RANKER_FILE
from reelway.platform.tokens import TokenSigner
from reelway.serving.metrics import IngressMetrics, RemoteRankerMetrics
from reelway.serving.onnx_model import OnnxModel
from reelway.serving.open_inference.client import RemoteRanker
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import LocalStages, RequestPath
from reelway.serving.viewer_query import viewer_query

HEADER: Final = "Inference-Header-Content-Length"
DIFFERENCE_BAR: Final = 1e-6
ROWS: Final = 10_000
TURNS: Final = 300
WARM_UP: Final = 20
_DATATYPES: Final = {"f": "FP32", "i": "INT64"}

Inputs = Mapping[str, NDArray[Any]]
Outputs = tuple[list[NDArray[Any]], list[float]]
"""The outputs of each request and its milliseconds."""


def compare_rows(
    loader: ReleaseLoader, server: RankServerProcess, viewers: Iterable[Mapping[str, Any]], source: str
) -> list[Row]:
    """Returns the largest difference over at least ``ROWS`` rows and the latency, per protocol."""
    requests = list(_until_enough(ranked_in_requests(loader, viewers)))
    count = sum(len(inputs["video_dense"]) for inputs in requests)
    graph = OnnxModel(loader.folder / RANKER_FILE, inputs=RANKER_INPUTS)
    expected = [graph.run(inputs) for inputs in requests]
    rows = []
    answers = {
        "gRPC": asyncio.run(_by_grpc(loader.release_id(), server, requests)),
        "REST, bytes": _by_rest(server, requests, binary=True),
        "REST, JSON": _by_rest(server, requests, binary=False),
    }
    for protocol, (outputs, took_ms) in answers.items():
        largest = max(float(np.abs(remote - local).max()) for remote, local in zip(outputs, expected, strict=True))
        metric = f"{protocol}: largest difference, {count} rows of {len(requests)} requests ({source})"
        rows += [
            Row(metric, largest, "", f"<= {DIFFERENCE_BAR:g}", largest <= DIFFERENCE_BAR),
            Row(f"{protocol}: one call of {count // len(requests)} candidates, p50", float(np.median(took_ms)), "ms"),
        ]
    return rows


def ranked_in_requests(loader: ReleaseLoader, viewers: Iterable[Mapping[str, Any]]) -> Iterator[Inputs]:
    """Yields the ranker's inputs for one request of each viewer."""
    table, retrieval = loader.table(), loader.retrieval()
    now_s = float(table.uploaded_at_s.base.max())
    for row in viewers:
        query = viewer_query(row, RequestContext(), now_s, table, seed=0)
        candidates = retrieval.retrieve(query)
        yield {
            "viewer_dense": query.arrays.viewer_dense,
            "viewer_categories": query.arrays.viewer_categories,
            "viewer_embedding": candidates.viewer_embedding,
            **table.gather(candidates.rows, now_s).as_inputs(),
        }


def added_in_one_process(
    loader: ReleaseLoader, server: RankServerProcess, viewers: list[Mapping[str, Any]]
) -> list[Row]:
    """Measures what the call adds to the request path without Ray.

    The two variants take turns, so that other load on the machine affects both.
    """
    release, now_s = loader.release_id(), float(loader.table().uploaded_at_s.max())
    stages, signer = loader.stages(), TokenSigner(b"the benchmark's secret of tokens")

    async def measure_turns() -> NDArray[np.float64]:
        ranker = RemoteRanker(
            f"127.0.0.1:{server.grpc_port}", release, RemoteRankerMetrics(CollectorRegistry(), release)
        )
        remote = LocalStages(stages.retrieval, loader.ranking(ranker), stages.reranking)
        paths = [
            RequestPath(loader.router_release(), variant, signer, IngressMetrics(CollectorRegistry()))
            for variant in (stages, remote)
        ]
        took_ms = []
        for i in range(-WARM_UP, TURNS):
            turn = []
            for path in paths:
                request = RecommendRequest(viewer_id=i % len(viewers), count=20)
                started = time.perf_counter()
                result = await path.recommend(request, viewers[request.viewer_id], now_s)
                turn.append(1000 * (time.perf_counter() - started))
                if result.response.degraded:
                    raise SystemExit(f"a response was degraded: {result.response.degraded}")
            took_ms.append(turn)
        await ranker.close()
        return np.array(took_ms[WARM_UP:])

    local_ms, remote_ms = asyncio.run(measure_turns()).T
    added = float(np.median(remote_ms) - np.median(local_ms))
    return [
        Row("request path in one process, local ranker, p50", float(np.median(local_ms)), "ms"),
        Row("request path in one process, remote ranker, p50", float(np.median(remote_ms)), "ms"),
        Row(f"request path in one process: added at p50, {TURNS} turns", added, "ms"),
    ]


def _until_enough(requests: Iterator[Inputs]) -> Iterator[Inputs]:
    count = 0
    for inputs in requests:
        yield inputs
        count += len(inputs["video_dense"])
        if count >= ROWS:
            return
    raise SystemExit(f"the viewers have {count} rows, expected {ROWS}; use a run with more viewers")


async def _by_grpc(release: str, server: RankServerProcess, requests: list[Inputs]) -> Outputs:
    remote = RemoteRanker(f"127.0.0.1:{server.grpc_port}", release, RemoteRankerMetrics(CollectorRegistry(), release))
    outputs, took_ms = [], []
    await remote.score(requests[0])
    for inputs in requests:
        started = time.perf_counter()
        outputs.append(await remote.score(inputs))
        took_ms.append(1000 * (time.perf_counter() - started))
    await remote.close()
    return outputs, took_ms


def _by_rest(server: RankServerProcess, requests: list[Inputs], *, binary: bool) -> Outputs:
    outputs, took_ms = [], []
    with httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}", timeout=60, trust_env=False) as client:
        for inputs in requests:
            text, tensors = _rest_request(inputs, binary=binary)
            headers = {HEADER: str(len(text))} if binary else {}
            started = time.perf_counter()
            answer = client.post("/v2/models/ranker/infer", content=text + tensors, headers=headers)
            took_ms.append(1000 * (time.perf_counter() - started))
            outputs.append(_rest_output(answer.raise_for_status(), binary=binary))
    return outputs, took_ms


def _rest_request(inputs: Inputs, *, binary: bool) -> tuple[bytes, bytes]:
    described = []
    for name, value in inputs.items():
        if binary:
            data: dict[str, Any] = {"parameters": {"binary_data_size": value.nbytes}}
        else:  # JSON can express a missing number only as null
            data = {"data": np.where(np.isnan(value), None, value.astype(object)).ravel().tolist()}
        described.append({"name": name, "datatype": _DATATYPES[value.dtype.kind], "shape": list(value.shape), **data})
    document = {"inputs": described, "parameters": {"binary_data_output": binary}}
    tensors = b"".join(value.tobytes() for value in inputs.values()) if binary else b""
    return json.dumps(document).encode(), tensors


def _rest_output(answer: httpx.Response, *, binary: bool) -> NDArray[Any]:
    if not binary:
        (output,) = answer.json()["outputs"]
        return np.array(output["data"], dtype=np.float32).reshape(output["shape"])
    length = int(answer.headers[HEADER])
    (output,) = json.loads(answer.content[:length])["outputs"]
    return np.frombuffer(answer.content[length:], dtype="<f4").reshape(output["shape"])
