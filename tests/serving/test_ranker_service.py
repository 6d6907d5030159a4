"""The ranker's bounded queue, its deadlines, its readiness and the limits of a request's body, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from tests.support.serving.rank_server import ReleaseFixture, make_release

from reelway.platform.errors import DigestMismatchError, ReleaseNotFoundError
from reelway.serving.open_inference.errors import DeadlineExceededError, ServerBusyError
from reelway.serving.open_inference.ranker_service import LoadedRanker, RankerService
from reelway.serving.open_inference.rest_server import RequestFilter, create_rest_listener


@pytest.fixture(scope="module")
def release_fixture(tmp_path_factory: pytest.TempPathFactory) -> ReleaseFixture:
    return make_release(tmp_path_factory.mktemp("release"))


def counted(service: RankerService, registry: CollectorRegistry, outcome: str) -> float | None:
    labels = {"release": service.release[:12], "outcome": outcome}
    return registry.get_sample_value("reelway_ranking_server_requests_total", labels)


def test_full_queue_rejects_further_requests(release_fixture: ReleaseFixture) -> None:
    """A request whose deadline passes in the queue is rejected as well, and its work never runs."""

    async def fill() -> list[float | None]:
        loop, started, proceed = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        registry = CollectorRegistry()
        service = RankerService(release_fixture.ranker, registry, threads=1, max_queued=1)
        service.warm_up()
        finished: list[str] = []

        def slow(_: LoadedRanker) -> tuple[int, str]:
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(proceed.wait(), loop).result(30)
            return 1, "slow"

        def quick(_: LoadedRanker) -> tuple[int, str]:
            finished.append("quick")
            return 1, "quick"

        first = asyncio.create_task(service.submit(slow))
        await started.wait()
        late = asyncio.create_task(service.submit(quick, within_s=0.01))
        await asyncio.sleep(0)
        with pytest.raises(ServerBusyError, match="2 requests are in flight, expected at most 2"):
            await service.submit(quick)
        await asyncio.sleep(0.02)
        proceed.set()
        assert await first == "slow"
        with pytest.raises(DeadlineExceededError):
            await late
        assert finished == []
        assert await service.submit(quick) == "quick"
        service.close()
        return [counted(service, registry, outcome) for outcome in ("ok", "busy", "late")]

    assert asyncio.run(fill()) == [2, 1, 1]


def test_service_is_ready_between_warm_up_and_draining(release_fixture: ReleaseFixture) -> None:
    async def live() -> list[bool]:
        service = RankerService(release_fixture.ranker, CollectorRegistry())
        ready = [service.ready]
        service.warm_up()
        ready.append(service.ready)
        service.start_draining()
        ready.append(service.ready)
        assert await service.submit(lambda _: (1, "answered")) == "answered"
        service.close()
        return ready

    assert asyncio.run(live()) == [False, True, False]


def test_ranker_that_fails_its_warm_up_is_never_ready(release_fixture: ReleaseFixture) -> None:
    class BrokenRanker(LoadedRanker):
        def run(self, inputs: Any) -> Any:
            raise RuntimeError(f"broken for {len(inputs)} inputs")

    service = RankerService(BrokenRanker(release_fixture.folder, max_candidates=10), CollectorRegistry())
    with pytest.raises(RuntimeError):
        service.warm_up()
    service.close()
    assert not service.ready


def test_changed_ranker_file_is_never_loaded(release_fixture: ReleaseFixture, tmp_path: Path) -> None:
    for name in ("manifest.json", "ranker.onnx"):
        (tmp_path / name).write_bytes((release_fixture.folder / name).read_bytes())
    with (tmp_path / "ranker.onnx").open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(DigestMismatchError, match=r"ranker\.onnx has SHA-256"):
        LoadedRanker(tmp_path, max_candidates=10)
    with pytest.raises(ReleaseNotFoundError):
        LoadedRanker(tmp_path / "nothing", max_candidates=10)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]})
    await send({"type": "http.response.body", "body": message["body"]})


@contextlib.asynccontextmanager
async def filtered(service: RankerService, **limits: Any) -> AsyncIterator[int]:
    """Serves ``echo`` behind the filter and yields the port."""
    listener = create_rest_listener("127.0.0.1", 0)
    config = uvicorn.Config(
        RequestFilter(echo, service, **{"max_bytes": 1000, "body_timeout_s": 0.5, **limits}),
        log_config=None, lifespan="off",
    )  # fmt: skip
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def exchange(port: int, request: bytes, *, leave: bool = False) -> bytes:
    """Returns all bytes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await writer.drain()
    response = b"" if leave else await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return response


def test_incomplete_body_is_408_and_ends_the_connection(release_fixture: ReleaseFixture) -> None:
    async def send() -> None:
        registry = CollectorRegistry()
        service = RankerService(release_fixture.ranker, registry)
        service.warm_up()
        head = b"POST /v2/models/ranker/infer HTTP/1.1\r\nHost: a\r\n"
        cut_off = head + b"Content-Length: 10\r\n\r\n012345678"
        async with filtered(service) as port:
            start_s = time.monotonic()
            response = await exchange(port, cut_off)
            assert time.monotonic() - start_s < 10
            assert response.startswith(b"HTTP/1.1 408")
            assert b"9 bytes of the body arrived in 0.5 s" in response
            assert b"connection: close" in response
            assert (await exchange(port, head + b"Content-Length: ten\r\n\r\n")).startswith(b"HTTP/1.1 400")
            await exchange(port, cut_off, leave=True)
            too_large = await exchange(port, head + b"Content-Length: 2000\r\n\r\n" + b"0" * 1001)
            assert too_large.startswith(b"HTTP/1.1 413")
            complete = head + b"Connection: close\r\nContent-Length: 10\r\n\r\n0123456789"
            assert b"\r\n0123456789\r\n" in await exchange(port, complete)
        assert counted(service, registry, "late") == 1
        assert counted(service, registry, "refused") == 1
        assert not counted(service, registry, "failed")

    asyncio.run(send())


@pytest.mark.parametrize("length", [12, None])
def test_filter_removes_the_served_version_from_the_path(release_fixture: ReleaseFixture, length: int | None) -> None:
    async def send() -> None:
        service = RankerService(release_fixture.ranker, CollectorRegistry())
        service.warm_up()
        head = b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        async with filtered(service) as port:
            path = f"/v2/models/ranker/versions/{service.release[:length]}/ready"
            assert b"x-path: /v2/models/ranker/ready\r\n" in await exchange(port, b"GET " + path.encode() + head)
            other = await exchange(port, b"GET /v2/models/ranker/versions/0/ready" + head)
            assert other.startswith(b"HTTP/1.1 404")

    asyncio.run(send())
