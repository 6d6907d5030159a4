"""The rank server: ``kserve.ModelServer`` with one ``RankerModel``, and a shutdown that drains.

The release is on disk before the server starts: an init container fetches and verifies it with
``reelway release fetch --verify``. A server that listens is therefore ready.

``kserve.ModelServer`` is extended where it is unfit. At SIGTERM it unloads its models and closes its ports at once, so
a request that is on its way fails. ``RankServer`` drains: it reports that it is not ready, answers requests for
``drain_s``, then closes its ports and lets the requests in flight finish. The queue limit is in ``ranker_service``,
the limits of REST in ``rest_server``, those of gRPC in ``grpc_server``, strict decoding in ``data_plane``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kserve import ModelServer
from prometheus_client import REGISTRY

from reelway.platform.listen_address import EVERYWHERE
from reelway.platform.stop_signals import handled_signals
from reelway.serving.open_inference.data_plane import RankerDataPlane, ReadOnlyRepository
from reelway.serving.open_inference.grpc_server import RankerGrpcServer
from reelway.serving.open_inference.kserve_model import RankerModel
from reelway.serving.open_inference.ranker_service import LoadedRanker, RankerService
from reelway.serving.open_inference.rest_server import RankerRestServer, create_rest_listener

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankServerOptions:
    """Options of a rank server."""

    release_dir: Path
    """Folder of one release, verified."""
    host: str = EVERYWHERE
    http_port: int = 8080
    """Port of REST, health checks and metrics; 0 selects a free port."""
    grpc_port: int = 8081
    """Port of gRPC; 0 selects a free port."""
    threads: int = 1
    """Requests that run at the same time."""
    max_queued: int = 32
    """Requests that may wait for a thread; further requests are rejected."""
    max_candidates: int = 4096
    """Largest number of candidates of a request."""
    max_bytes: int = 16 << 20
    """Largest size of a request."""
    body_timeout_s: float = 10.0
    """Time in which a request's body must arrive over REST."""
    drain_s: float = 5.0
    """Time after SIGTERM in which new requests are still accepted."""
    grace_period_s: float = 8.0
    """Time after draining for the requests in flight."""


@dataclass(frozen=True)
class BoundPorts:
    """The ports on which the server listens."""

    http_port: int
    grpc_port: int


class RankServer(ModelServer):
    """See the module."""

    def __init__(
        self, service: RankerService, options: RankServerOptions, on_listening: Callable[[BoundPorts], None]
    ) -> None:
        super().__init__(
            http_port=options.http_port, grpc_port=options.grpc_port, workers=1, enable_latency_logging=False
        )
        self.dataplane = RankerDataPlane(self.registered_models, service)
        self.model_repository_extension = ReadOnlyRepository(self.registered_models)
        self._service = service
        self._options = options
        self._on_listening = on_listening
        self._stopping = asyncio.Event()

    def start(self, models: list[RankerModel]) -> None:
        """Serves until SIGTERM, SIGINT or SIGHUP.

        Raises:
            ServingError: if an address cannot be listened at.
        """
        self._register_and_check_atleast_one_model_is_ready(models)
        asyncio.run(self._serve())

    def stop(self, sig: int) -> None:
        """Starts draining. KServe's own method unloads the model and closes the ports."""
        log.info("signal %d: draining for %g s", sig, self._options.drain_s)
        self._service.start_draining()
        self._stopping.set()

    async def _serve(self) -> None:
        loop, options = asyncio.get_running_loop(), self._options
        for number in handled_signals():
            loop.add_signal_handler(number, self.stop, number)
        parts = (self.dataplane, self.model_repository_extension, self._service)
        rest = RankerRestServer(
            create_rest_listener(options.host, options.http_port), *parts, max_bytes=options.max_bytes,
            body_timeout_s=options.body_timeout_s, grace_period_s=options.grace_period_s,
        )  # fmt: skip
        grpc_server = RankerGrpcServer(
            options.grpc_port, *parts, host=options.host, max_bytes=options.max_bytes,
            grace_period_s=options.grace_period_s,
        )  # fmt: skip
        grpc_port = await grpc_server.bind()
        serving, stopping = asyncio.create_task(rest.start()), asyncio.create_task(self._stopping.wait())
        self._on_listening(BoundPorts(rest.config.port, grpc_port))
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await asyncio.sleep(options.drain_s)
        rest.stop()
        await asyncio.gather(serving, grpc_server.stop())


def run_rank_server(options: RankServerOptions, on_listening: Callable[[BoundPorts, str], None]) -> None:
    """Loads the ranker and serves it until SIGTERM. It must run in the main thread, once per process.

    Args:
        options: the server's options.
        on_listening: called with the ports and the release's id when the server is ready.

    Raises:
        ReleaseError: if the folder has no release, or another ranker than its manifest names.
        ServingError: if an address cannot be listened at.
    """
    _quieten_kserve()
    ranker = LoadedRanker(options.release_dir, max_candidates=options.max_candidates)
    service = RankerService(ranker, REGISTRY, threads=options.threads, max_queued=options.max_queued)
    try:
        service.warm_up()
        server = RankServer(service, options, lambda ports: on_listening(ports, service.release))
        server.start([RankerModel(service)])
    finally:
        service.close()


def _quieten_kserve() -> None:
    """KServe logs a traceback for each invalid request. Metrics count these, and Uvicorn logs unexpected errors."""
    logger = logging.getLogger("kserve")
    logger.addHandler(logging.NullHandler())  # ModelServer configures the logging of a process that has no handler
    logger.setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
