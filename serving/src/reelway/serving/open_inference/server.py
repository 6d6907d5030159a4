"""The life of a rank server: it listens at once, is ready when its release is verified and warm, and ends without loss.

On SIGTERM it stops to be ready, goes on answering for a moment (until nobody is sent here any more), lets what is under
way finish, and ends. A release that ``verify`` refuses ends the process with the reason: nothing unverified is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.errors import ServingError
from reelway.platform.release.signing import load_public_keys
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import verify
from reelway.platform.rollout.traffic.serving_options import ReleaseArgs
from reelway.serving.open_inference.model import LoadedRanker, ServedRanker
from reelway.serving.open_inference.rest import build_rest_api
from reelway.serving.open_inference.rpc import RpcMethods

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankServerOptions:
    """What a rank server is started with; ``source.release`` is a whole id."""

    source: ReleaseArgs
    host: str = "0.0.0.0"
    http_port: int = 8080
    """Of REST, health and metrics; 0 chooses a free one."""
    grpc_port: int = 8081
    """Of gRPC; 0 chooses a free one."""
    threads: int = 1
    """Requests that are worked out at the same time."""
    waiting: int = 32
    """Requests that may wait for that; more are sent away."""
    candidates: int = 4096
    """The most of one request."""
    max_bytes: int = 16 << 20
    """Of one request."""
    body_s: float = 10.0
    """In which a request's body must have arrived."""
    drain_s: float = 5.0
    """From SIGTERM, in which requests still come and are answered."""
    grace_s: float = 20.0
    """After that, for what is under way."""


@dataclass(frozen=True)
class Listening:
    """Where it really listens."""

    http_port: int
    grpc_port: int


async def run_rank_server(
    options: RankServerOptions,
    listening: Callable[[Listening], None],
    ready: Callable[[], None],
    stop: asyncio.Event,
) -> None:
    """Serve until ``stop``, which is what SIGTERM means here.

    Args:
        listening: called when both ports are open, before there is a release.
        ready: called when requests may come.

    Raises:
        ReleaseError: the release is not there, or it is refused.
        ServingError: an address cannot be listened at.
        StorageError: the release cannot be fetched.
    """
    served = ServedRanker(options.source.release, CollectorRegistry(), threads=options.threads, waiting=options.waiting)
    try:
        async with _grpc_server(served, options) as grpc_port, _http_server(served, options) as http_port:
            listening(Listening(http_port, grpc_port))
            loading = asyncio.create_task(asyncio.to_thread(load_verified, options))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                await served.begin(loading.result())
                ready()
                await stopping
                served.end()
                log.info("asked to end: answering for %g s more", options.drain_s)
                await asyncio.sleep(options.drain_s)
            stopping.cancel()
    finally:
        served.close()


def load_verified(options: RankServerOptions) -> LoadedRanker:
    """Fetch the release, check all of it, and load its ranker. The feature store is the graph's to ask."""
    source = options.source
    folder: Path = ReleaseStore(source.release_store).fetch(ReleaseId(source.release), source.release_cache)
    keys = load_public_keys(source.public_keys)
    verified = verify(folder, public_keys=keys, feature_services=None, expected_id=source.release)
    log.info("release %s verified: %d checks passed", source.release[:12], len(verified.checks))
    return LoadedRanker(folder, candidates=options.candidates)


@asynccontextmanager
async def _grpc_server(served: ServedRanker, options: RankServerOptions) -> AsyncIterator[int]:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", options.max_bytes),
            ("grpc.max_send_message_length", options.max_bytes),
            ("grpc.so_reuseport", 0),
        ]
    )
    server.add_generic_rpc_handlers((RpcMethods(served).handler(),))
    address = f"{options.host}:{options.grpc_port}"
    try:
        port: int = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ServingError(f"cannot listen at {address}: {error}; is the port taken?") from error
    await server.start()
    try:
        yield port
    finally:
        await server.stop(options.grace_s)


class _Uvicorn(uvicorn.Server):
    """Signals are this program's own: uvicorn would stop at once, and gRPC after it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def last_of_its_connection(api: ASGIApp, served: ServedRanker) -> ASGIApp:
    """While the server is not ready, and so while it drains, every answer is the last of its connection and says so.

    Nobody is left with an idle connection that is closed in the moment in which the next request is sent on it.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and not served.ready:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await api(scope, receive, send_last)

    return answer


@asynccontextmanager
async def _http_server(served: ServedRanker, options: RankServerOptions) -> AsyncIterator[int]:
    address = (options.host, options.http_port)
    try:
        listener = socket.create_server(address, family=socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    except OSError as error:
        raise ServingError(f"cannot listen at {address[0]}:{address[1]}: {error}; is the port taken?") from error
    # An answer is two writes, and the second must not wait for the first one's acknowledgement: that is 40 ms.
    # (asyncio does this itself, but not for a listener whose protocol is left open, as this one's is.)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    api = build_rest_api(served, max_bytes=options.max_bytes, body_s=options.body_s)
    server = _Uvicorn(
        uvicorn.Config(
            last_of_its_connection(api, served),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(options.grace_s),
        )
    )
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await running
