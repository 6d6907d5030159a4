"""The request path as Ray Serve deployments: the only file that knows Ray.

Two kinds of application, so that a release comes and goes as a whole:

- one per release, named by its id: ``Retrieval``, ``Ranking`` and ``Reranking``, each scaled on its own;
- ``router``, which takes HTTP, holds a ``Routing`` and calls the stages of the viewer's release. The routing is its
  ``user_config``: written through Serve's configuration it reconfigures it in place. (``serve.run`` from Python makes
  a new version of everything it is given, and replaces the replicas.)

A hop carries one small tuple of arrays (2 to 10 kB). A hop that fails or is late raises, and the path steps down.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from reelway.serving.serve_settings import apply_settings, own_haproxy_places

apply_settings()  # before Ray Serve is imported

import numpy as np  # noqa: E402
import ray  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from prometheus_client import CollectorRegistry  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402

from reelway.platform.contracts.api import RequestContext  # noqa: E402
from reelway.platform.errors import ServingError  # noqa: E402
from reelway.platform.features.store import ViewerRows, open_feature_store  # noqa: E402
from reelway.platform.features.vector_log import VectorLog  # noqa: E402
from reelway.platform.rollout.routing import Routing  # noqa: E402
from reelway.platform.tokens import TokenSigner  # noqa: E402
from reelway.serving import metrics  # noqa: E402
from reelway.serving.http_api import build_http_api  # noqa: E402
from reelway.serving.open_releases import OpenRelease  # noqa: E402
from reelway.serving.parity_sample import ParitySample  # noqa: E402
from reelway.serving.release_loader import ReleaseLoader  # noqa: E402
from reelway.serving.router import Router, RouterParts  # noqa: E402
from reelway.serving.stages.arrays import F32, Candidates, Codes, Rows, Slate, ViewerQuery  # noqa: E402
from reelway.serving.time_budget import TimeBudget  # noqa: E402
from reelway.serving.video_table import VideoTable  # noqa: E402
from reelway.serving.viewers import viewer_query  # noqa: E402

ROUTER: Final = "router"
_QUIET: Final = {"log_level": "WARNING", "enable_access_log": False}
"""One log line per request and hop costs more than the hop's arithmetic; the metrics count them all."""


@dataclass(frozen=True)
class Replicas:
    """How many of each deployment."""

    router: int = 1
    retrieval: int = 1
    ranking: int = 1
    reranking: int = 1


@dataclass(frozen=True)
class BudgetsMs:
    """How long a part may take before the path goes on without it, the hop included."""

    viewer_row: float = 250.0
    retrieval: float = 500.0
    ranking: float = 500.0
    reranking: float = 250.0


@dataclass(frozen=True)
class ServiceOptions:
    """One start of the service.

    ``features_dir`` is the run's feature store, or ``None`` to serve everybody as unknown; ``metrics_dir`` belongs to
    this start alone; ``token_secrets`` are ``TokenSigner``'s; ``vector_log`` takes the share ``parity_ratio`` of what
    is served, for the parity replay; ``port`` must be free.
    """

    releases_dir: Path  # holds <release id>/
    metrics_dir: Path
    token_secrets: tuple[bytes, ...] = field(repr=False)
    features_dir: Path | None = None
    vector_log: Path | None = None
    parity_ratio: float = 0.01
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: Replicas = Replicas()
    budgets: BudgetsMs = BudgetsMs()


class RetrievalStage:
    """Viewer tower, index and lists of one release."""

    def __init__(self, folder: Path) -> None:
        loader = ReleaseLoader(folder)
        self._stage = loader.retrieval()
        self._metrics = metrics.RetrievalMetrics(CollectorRegistry(), loader.release_id())
        self._stage.retrieve(_nobody(loader.table()))  # the first call pays for what is set up late

    def retrieve(self, query: ViewerQuery) -> Candidates:
        with metrics.timed(self._metrics.latency):
            candidates = self._stage.retrieve(query)
        self._metrics.count(candidates)
        return candidates


class RankingStage:
    """Ranker and video table of one release."""

    def __init__(self, folder: Path) -> None:
        loader = ReleaseLoader(folder)
        self._stage = loader.ranking()
        self._metrics = metrics.RankingMetrics(CollectorRegistry(), loader.release_id())
        table = loader.table()
        nobody = _nobody(table).arrays
        some = np.arange(min(len(table), 500), dtype=np.int32)
        embedding = np.zeros((1, table.embedding.shape[1]), dtype=np.float32)
        self._stage.rank(
            nobody.viewer_dense, nobody.viewer_categories, embedding, some, np.zeros(len(some), np.float32), 0.0
        )

    def rank(self, dense: F32, categories: Any, embedding: F32, rows: Rows, similarity: F32, now_s: float) -> F32:
        with metrics.timed(self._metrics.latency):
            value = self._stage.rank(dense, categories, embedding, rows, similarity, now_s)
        self._metrics.candidates.inc(len(rows))
        return value


class RerankingStage:
    """Video table of one release. The root of the release's application: it holds the others so that they come and
    go together; the router calls all three itself."""

    def __init__(self, folder: Path, retrieval: Any, ranking: Any) -> None:
        loader = ReleaseLoader(folder)
        self._stage = loader.reranking()
        self._metrics = metrics.RerankingMetrics(CollectorRegistry(), loader.release_id())
        self._others = (retrieval, ranking)

    def rerank(self, rows: Rows, source: Codes, because: Rows, value: F32, liked: Rows, count: int, seed: int) -> Slate:
        with metrics.timed(self._metrics.latency):
            slate = self._stage.rerank(rows, source, because, value, liked, count=count, seed=seed)
        self._metrics.count(slate)
        return slate


def _nobody(table: VideoTable) -> ViewerQuery:
    return viewer_query({}, RequestContext(), time.time(), table, seed=0)


class RemoteStages:
    """The three stages of one release, in their own processes."""

    def __init__(self, application: str, budgets: BudgetsMs) -> None:
        # Made without asking whether the deployments are there: nothing waits, and they may come later.
        self._handles = [DeploymentHandle(stage, application) for stage in ("Retrieval", "Ranking", "Reranking")]
        self._retrieve = self._handles[0].retrieve
        self._rank = self._handles[1].rank
        self._rerank = self._handles[2].rerank
        self._within = {stage: TimeBudget(ms) for stage, ms in asdict(budgets).items()}

    async def close(self) -> None:
        """Give up the connections."""
        for handle in self._handles:
            await handle.shutdown_async()

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        return await self._within["retrieval"](lambda: self._retrieve.remote(query))

    async def rank(self, query: ViewerQuery, candidates: Candidates) -> F32:
        viewer = query.arrays
        return await self._within["ranking"](
            lambda: self._rank.remote(
                viewer.viewer_dense, viewer.viewer_categories, candidates.viewer_embedding,
                candidates.rows, candidates.similarity, query.now_s,
            )
        )  # fmt: skip

    async def rerank(self, query: ViewerQuery, candidates: Candidates, value: F32, count: int) -> Slate:
        liked = query.history_rows[query.history_weights > 0]
        return await self._within["reranking"](
            lambda: self._rerank.remote(
                candidates.rows, candidates.source, candidates.because, value, liked, count, query.seed
            )
        )


class RouterDeployment(Router):
    """The router in a replica of its own. Its ``user_config`` is a ``Routing``."""

    def __init__(self, options: ServiceOptions) -> None:
        rows = ViewerRows(open_feature_store(options.features_dir)) if options.features_dir else None
        sample = None
        if options.vector_log:
            vectors = VectorLog(options.vector_log, ratio=options.parity_ratio)
            sample = ParitySample(vectors, ThreadPoolExecutor(1, thread_name_prefix="parity-sample"))
        super().__init__(
            partial(_open_release, options),
            RouterParts(
                signer=TokenSigner(*options.token_secrets),
                registry=CollectorRegistry(),
                read_viewer=rows.read if rows else None,
                viewer_row_ms=options.budgets.viewer_row,
                sample=sample,
            ),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_api(self)


async def _open_release(options: ServiceOptions, release: str) -> OpenRelease:
    edge = await asyncio.to_thread(ReleaseLoader(options.releases_dir / release).edge)
    stages = RemoteStages(release, options.budgets)
    return OpenRelease(edge, stages, stages.close)


def release_application(release: str, options: ServiceOptions) -> serve.Application:
    """The stages of one release. Run it under the release's id."""
    folder, replicas = options.releases_dir / release, options.replicas
    # A stage computes and never waits: more than a few requests in one replica would wait inside it instead of going
    # to another.
    stage = {"max_ongoing_requests": 8, "ray_actor_options": _actor_options(options)}
    retrieval = serve.deployment(RetrievalStage, name="Retrieval", num_replicas=replicas.retrieval, **stage)
    ranking = serve.deployment(RankingStage, name="Ranking", num_replicas=replicas.ranking, **stage)
    reranking = serve.deployment(RerankingStage, name="Reranking", num_replicas=replicas.reranking, **stage)
    return reranking.bind(folder, retrieval.bind(folder), ranking.bind(folder))


def router_application(routing: Routing, options: ServiceOptions) -> serve.Application:
    """The router over applications that run already."""
    router = serve.deployment(
        serve.ingress()(RouterDeployment),
        name="Router",
        num_replicas=options.replicas.router,
        max_ongoing_requests=200,
        user_config=routing.model_dump(mode="json"),
        ray_actor_options=_actor_options(options),
    )
    return router.bind(options)


def _actor_options(options: ServiceOptions) -> dict[str, Any]:
    # Shares are small so that all deployments of two releases fit on a laptop; a cluster sets its own.
    environment = {metrics.FOLDER_VARIABLE: str(options.metrics_dir), "OMP_NUM_THREADS": "1"}
    return {"num_cpus": 0.1, "runtime_env": {"env_vars": environment}}


@contextmanager
def running_service(routing: Routing, options: ServiceOptions) -> Iterator[str]:
    """Ray and the service on this machine, from answering until the block is left. Yields the URL.

    Raises:
        ServingError: an application did not become healthy; Serve's own account is in the message.
    """
    options.metrics_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="reelway-") as place:  # a socket's path must be short
        os.environ.update(own_haproxy_places(Path(place)))
        with _local_ray():
            yield _deploy(routing, options)


@contextmanager
def _local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, 2),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        namespace="reelway",
    )
    try:
        yield
    finally:
        with _uninterrupted():
            serve.shutdown()
            ray.shutdown()


def _deploy(routing: Routing, options: ServiceOptions) -> str:
    serve.start(http_options={"host": options.host, "port": options.port}, logging_config=_QUIET)
    targets = [
        serve.RunTarget(release_application(release, options), name=release, route_prefix=None, logging_config=_QUIET)
        for release in routing.releases
    ]
    router = router_application(routing, options)
    try:
        serve.run_many([*targets, serve.RunTarget(router, name=ROUTER, route_prefix="/", logging_config=_QUIET)])
    except RuntimeError as error:  # what Serve raises for an application that does not become healthy
        raise ServingError(f"the service did not become healthy: {error}") from error
    return f"http://{options.host}:{options.port}"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C while things are being ended must not leave half of them running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
