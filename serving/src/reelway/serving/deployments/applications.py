"""Application builders that Ray Serve calls by import path: a release, the router and the outcomes.

Each builder takes typed arguments. The Serve config (``traffic.serve_config``) sets replicas, resources and
routing; this module sets only the limits that follow from the implementation.
"""

# No postponed annotations: Serve reads the builders' annotations to convert the config's arguments into models.

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.handle import DeploymentHandle

from reelway.platform.eventlog import open_event_log
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.vector_segments import open_vector_log
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.rollout.traffic.serving_options import OutcomesArgs, ReleaseArgs, RouterArgs
from reelway.platform.tokens import TokenSigner
from reelway.serving.deployments.stages import (
    FUSED_RELEASE,
    RANKING,
    RERANKING,
    RETRIEVAL,
    FusedRelease,
    RankingStage,
    RerankingStage,
    RetrievalStage,
    StageHandles,
)
from reelway.serving.fused import open_fused, shorten_switch_interval
from reelway.serving.http_api import build_http_api
from reelway.serving.outcomes import (
    EventLogWriter,
    ExposureBatch,
    ExposureBuffer,
    OutcomeCollector,
    build_outcomes_api,
    forward_exposures,
)
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.release_loader import open_trusted
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies
from reelway.serving.token_secrets import read_token_secrets

# A stage computes and never waits. With a higher limit, requests would queue inside one replica instead of going to
# another.
_STAGE: Final = {"max_ongoing_requests": 8}


def release(args: ReleaseArgs) -> serve.Application:
    """Builds the stages of one release. The application's name must be ``args.release``, which the router calls."""
    if args.composition == "fused":
        return serve.deployment(FusedRelease, name=FUSED_RELEASE).bind(args)
    retrieval = serve.deployment(RetrievalStage, name=RETRIEVAL, **_STAGE).bind(args)
    ranking = serve.deployment(RankingStage, name=RANKING, **_STAGE).bind(args)
    return serve.deployment(RerankingStage, name=RERANKING, **_STAGE).bind(args, retrieval, ranking)


def router(args: RouterArgs) -> serve.Application:
    """Builds the router, which receives the requests. Its ``user_config`` is a ``Routing``."""
    return serve.deployment(serve.ingress()(RouterDeployment), name="Router", max_ongoing_requests=200).bind(args)


def outcomes(args: OutcomesArgs) -> serve.Application:
    """Builds the application that outcomes are reported to. It has one replica, because one process owns its file."""
    deployment = serve.deployment(serve.ingress()(OutcomesDeployment), name="Outcomes", max_ongoing_requests=200)
    return deployment.bind(args)


class RouterDeployment(Router):
    """A replica of the router."""

    def __init__(self, args: RouterArgs) -> None:
        rows = ViewerRowReader(open_feature_store(args.features_dir)) if args.features_dir else None
        sample = None
        if args.vector_log:
            vectors = open_vector_log(args.vector_log, ratio=args.parity_ratio)
            sample = ParitySampler(vectors, ThreadPoolExecutor(1, thread_name_prefix="parity-sample"))
        parts = RouterDependencies(
            signer=TokenSigner(*read_token_secrets(args.token_secrets)),
            registry=CollectorRegistry(),
            read_viewer=rows.read if rows else None,
            viewer_row_ms=args.budgets.viewer_row,
            sample=sample,
            exposures=ExposureBuffer() if args.outcomes else None,
            max_ongoing_requests=args.max_ongoing_requests,
            max_ongoing_sustained=args.max_ongoing_sustained,
        )
        super().__init__(self._open, parts)
        if args.composition == "fused":
            shorten_switch_interval()
        self._args = args
        self._forwarding: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_api(self)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Takes a ``Routing``; see ``Router.reconfigure``."""
        await super().reconfigure(config)
        buffer = self._dependencies.exposures
        if self._args.outcomes and buffer and self._forwarding is None:
            expose = DeploymentHandle("Outcomes", self._args.outcomes).expose
            self._forwarding = asyncio.create_task(forward_exposures(buffer, expose.remote))

    async def _open(self, release: str) -> OpenRelease:
        args = self._args
        loader = await asyncio.to_thread(open_trusted, args.release_args(release))
        if args.composition == "fused":
            return await asyncio.to_thread(open_fused, loader, args.budgets.path)
        router_release = await asyncio.to_thread(loader.router_release)
        stages = StageHandles(release, args.budgets)
        return OpenRelease(router_release, stages, stages.close)


class OutcomesDeployment:
    """The replica of the outcome collector."""

    def __init__(self, args: OutcomesArgs) -> None:
        self._signer = TokenSigner(*read_token_secrets(args.token_secrets))
        self._collector = OutcomeCollector(args.state)
        self._appender = EventLogWriter(open_event_log(args.event_log)) if args.event_log else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_outcomes_api(self._collector, self._signer, self._appender)

    async def expose(self, batch: ExposureBatch) -> None:
        """Counts the impressions that a router has shown; returns when they are on disk."""
        await asyncio.wrap_future(self._collector.record_exposures(batch))
