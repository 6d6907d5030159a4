"""Application builders that Ray Serve calls by import path: a release, the router and the outcomes.

Each builder takes typed arguments. The Serve config (``traffic.serve_config``) sets replicas, resources and
routing; this module sets only the limits that follow from the implementation.
"""

# No postponed annotations: Serve reads the builders' annotations to convert the config's arguments into models.

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any, Final

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.handle import DeploymentHandle
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from reelway.platform.contracts.manifest import Manifest
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.eventlog import EventLog, LogRecord
from reelway.platform.eventlog.topics import Topic, open_topic, topic_address
from reelway.platform.features.feast_store import open_feature_store, registered_services
from reelway.platform.features.vector_segments import open_vector_log
from reelway.platform.features.viewer_memory import open_viewer_memory
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.release.verify import check_feature_services
from reelway.platform.rollout.traffic.serving_options import OutcomesArgs, ReleaseArgs, RouterArgs
from reelway.platform.tokens import TokenSigner
from reelway.platform.viewer_pseudonyms import use_secret
from reelway.serving.access import InternalCredential, build_viewer_access, describe_access
from reelway.serving.deployments.kept_log import KeptLog
from reelway.serving.deployments.replica_logging import log_to_replica_file
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
from reelway.serving.metrics import IntakeMetrics
from reelway.serving.outcomes import (
    EventLogWriter,
    ExposureWriter,
    OutcomeCollector,
    OutcomeIntake,
    build_outcomes_api,
)
from reelway.serving.outcomes.append_log import AppendLog
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.release_loader import open_trusted
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies
from reelway.serving.serve_settings import HAPROXY_VARIABLE
from reelway.serving.takedown_follower import follow_takedowns
from reelway.serving.token_secrets import read_token_secrets

log = logging.getLogger(__name__)

# A stage computes and never waits. With a higher limit, requests would queue inside one replica instead of going to
# another.
_STAGE: Final = {"max_ongoing_requests": 8}


def _drop_trailers() -> None:
    """Keeps trailers out of the headers of an ASGI scope.

    uvicorn appends them, after what HAProxy wrote: a client could write the last X-Forwarded-For itself. HAProxy 2.8
    has no option to drop them.
    """
    complete = HttpToolsProtocol.on_headers_complete

    def on_headers_complete(protocol: HttpToolsProtocol) -> None:
        complete(protocol)
        protocol.headers = list(protocol.headers)

    HttpToolsProtocol.on_headers_complete = on_headers_complete  # type: ignore[assignment, method-assign]


_drop_trailers()


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
    """Builds the application that sums exposures and outcomes. It has one replica: one process owns the file."""
    deployment = serve.deployment(serve.ingress()(OutcomesDeployment), name="Outcomes", max_ongoing_requests=200)
    return deployment.bind(args)


class RouterDeployment(Router):
    """A replica of the router."""

    def __init__(self, args: RouterArgs) -> None:
        log_to_replica_file()
        secrets = read_token_secrets(args.token_secrets)
        use_secret(secrets[0])
        self._features = store = open_feature_store(args.features_dir) if args.features_dir else None
        memory = open_viewer_memory(store) if store else None
        viewers = ViewerRowReader(store, memory=memory) if store else None
        sample = None
        if args.vector_log:
            vectors = open_vector_log(args.vector_log, ratio=args.parity_ratio)
            sample = ParitySampler(vectors, ThreadPoolExecutor(1, thread_name_prefix="parity-sample"))
        parts = RouterDependencies(
            signer=TokenSigner(*secrets),
            registry=CollectorRegistry(),
            read_viewer=viewers.read_viewer if viewers else None,
            memory=memory,
            viewer_row_ms=args.budgets.viewer_row,
            sample=sample,
            max_ongoing_requests=args.max_ongoing_requests,
            max_ongoing_sustained=args.max_ongoing_sustained,
        )
        super().__init__(self._open, parts)
        if args.composition == "fused":
            shorten_switch_interval()
        self._args = args
        behind_haproxy = os.environ.get(HAPROXY_VARIABLE) == "1"
        self._access = build_viewer_access(
            args.access, InternalCredential(secrets), self.record_key_fault, behind_haproxy=behind_haproxy
        )
        log.info("%s", describe_access(args.access))
        if args.events:
            topic_address(args.events, Topic.OUTCOMES)  # raises if the address is invalid; no log is opened yet
        self._takedowns = follow_takedowns(args.events, parts.registry) if args.events else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_api(self, self._access)

    def close(self) -> None:
        """Stops what the replica runs and writes what is still queued; blocks."""
        super().close()
        if self._takedowns:
            self._takedowns.stop()
        if self._dependencies.sample:
            self._dependencies.sample.close()

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Takes a ``Routing``; see ``Router.reconfigure``."""
        if self._dependencies.exposures is None and (open_log := self._log_opener()):
            parts = self._dependencies
            parts.exposures = ExposureWriter(partial(open_log, Topic.EXPOSURES), self.count_lost_exposure)
            counts = IntakeMetrics(parts.registry)
            writer = EventLogWriter(partial(open_log, Topic.OUTCOMES), on_repeated=counts.repeated.inc)
            parts.outcomes = OutcomeIntake(parts.signer, writer, counts, parts.memory)
        if self._routing is None:
            await self._access.prepare()
        await super().reconfigure(config)

    def _log_opener(self) -> Callable[[Topic], AppendLog] | None:
        """Returns what opens a topic for appending: directly, or through the application that keeps the log."""
        if self._args.events:
            return partial(open_topic, self._args.events)
        if not self._args.log_keeper:
            return None
        keeper, loop = DeploymentHandle("Outcomes", self._args.log_keeper), asyncio.get_running_loop()

        async def append(topic: Topic, records: Sequence[LogRecord]) -> list[int]:
            offsets: list[int] = await keeper.append.remote(topic, records)
            return offsets

        return lambda topic: KeptLog(topic, append, loop)

    async def _open(self, release: str) -> OpenRelease:
        args = self._args
        loader = await asyncio.to_thread(open_trusted, args.release_args(release), self._takedowns)
        await asyncio.to_thread(self._check_features, loader.manifest())
        if args.composition == "fused":
            return await asyncio.to_thread(open_fused, loader, args.budgets.path)
        router_release = await asyncio.to_thread(loader.router_release)
        stages = StageHandles(release, args.budgets)
        return OpenRelease(router_release, stages, stages.close)

    def _check_features(self, manifest: Manifest) -> None:
        """Rejects a release without traffic whose feature services differ from the store's; see decision 0028.

        Raises:
            IncompatibleReleaseError: if they differ and the release has no traffic.
        """
        if self._features is None:
            return
        required = manifest.feature_services
        try:
            check_feature_services(required, registered_services(self._features, [one.name for one in required]))
        except IncompatibleReleaseError as error:
            if not self.has_traffic(manifest.release_id):
                raise
            self.count_foreign_features(manifest.release_id)
            log.error("release %s is served with features that it was not trained on: %s", manifest.name, error)


class OutcomesDeployment:
    """The replica of the outcome collector. Without another event log, it also keeps the log for the routers."""

    def __init__(self, args: OutcomesArgs) -> None:
        log_to_replica_file()
        self._events = args.events
        self._credential = InternalCredential(read_token_secrets(args.token_secrets))
        self._collector = OutcomeCollector(
            args.state, partial(open_topic, args.events), require_authenticated=args.require_authenticated
        )
        self._kept: dict[Topic, EventLog] = {}
        self._opening = Lock()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_outcomes_api(self._collector, self._credential, self._close_log)

    async def append(self, topic: Topic, records: Sequence[LogRecord]) -> list[int]:
        """Appends a router's records to the event log; returns when they are on disk."""
        return await asyncio.to_thread(lambda: self._kept_log(topic).append(records))

    def _kept_log(self, topic: Topic) -> EventLog:
        with self._opening:
            if topic not in self._kept:
                self._kept[topic] = open_topic(self._events, topic)
            return self._kept[topic]

    def _close_log(self) -> None:
        with self._opening:
            for events in self._kept.values():
                events.close()
            self._kept.clear()
