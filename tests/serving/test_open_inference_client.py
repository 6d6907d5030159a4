"""The request path's client of a rank server, with a KServe gRPC server in the test's event loop."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from kserve import ModelRepository
from prometheus_client import CollectorRegistry
from tests.support.release_files import NOW_S
from tests.support.serving.rank_server import ReleaseFixture, make_release

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.errors import ServingError
from reelway.platform.tokens import TokenSigner
from reelway.serving.metrics import SHORT_RELEASE, IngressMetrics, RemoteRankerMetrics
from reelway.serving.open_inference.client import RemoteRanker, server_address
from reelway.serving.open_inference.data_plane import RankerDataPlane, ReadOnlyRepository
from reelway.serving.open_inference.errors import ServerBusyError
from reelway.serving.open_inference.grpc_server import RankerGrpcServer
from reelway.serving.open_inference.kserve_model import RankerModel
from reelway.serving.open_inference.messages import SERVICE, load_messages
from reelway.serving.open_inference.ranker_service import RankerService
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import LocalStages, Recommendation, RequestPath

Work = Callable[["InProcessServer"], Coroutine[Any, Any, Any]]
messages = load_messages()


@pytest.fixture(scope="module")
def release_fixture(tmp_path_factory: pytest.TempPathFactory) -> ReleaseFixture:
    return make_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class InProcessServer:
    """A gRPC server in this process's event loop, and the client that calls it."""

    release_fixture: ReleaseFixture
    port: int
    server: Any
    ranker: RemoteRanker
    registry: CollectorRegistry

    def faults(self, kind: str) -> float:
        labels = {"release": self.release_fixture.release[:SHORT_RELEASE], "kind": kind}
        return self.registry.get_sample_value("reelway_ranking_remote_faults_total", labels) or 0.0

    async def stop(self) -> None:
        await self.server.stop()

    async def restart(self) -> None:
        self.server = await started(self.release_fixture, self.port)


async def started(
    release_fixture: ReleaseFixture, port: int, *, release: str = "", service_class: type[RankerService] = RankerService
) -> RankerGrpcServer:
    """Starts KServe's gRPC server of the release's ranker. ``release`` is the id that the server states instead."""
    service = service_class(release_fixture.ranker, CollectorRegistry())
    service.release = release or release_fixture.release
    service.warm_up()
    models = ModelRepository()
    models.update(RankerModel(service))
    server = RankerGrpcServer(
        port, RankerDataPlane(models, service), ReadOnlyRepository(models), service, host="127.0.0.1",
        max_bytes=16 << 20, grace_period_s=0,
    )  # fmt: skip
    deadline = time.monotonic() + 10
    while True:
        try:
            assert await server.bind() == port
            return server
        except ServingError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


def within(release_fixture: ReleaseFixture, port: int, work: Work, **settings: Any) -> Any:
    """Runs the work while a server listens at the port."""

    async def all_of_it() -> Any:
        registry = CollectorRegistry()
        ranker = RemoteRanker(
            f"127.0.0.1:{port}", release_fixture.release, RemoteRankerMetrics(registry, release_fixture.release)
        )
        under_test = InProcessServer(
            release_fixture, port, await started(release_fixture, port, **settings), ranker, registry
        )
        try:
            return await work(under_test)
        finally:
            await ranker.close()
            await under_test.stop()

    return asyncio.run(all_of_it())


def test_server_address_replaces_the_release() -> None:
    assert (
        server_address("reelway-{release}-predictor:8081", "a" * 64) == f"reelway-{'a' * SHORT_RELEASE}-predictor:8081"
    )
    assert server_address("ranker:8081", "a" * 64) == "ranker:8081"


def test_client_does_not_import_the_kserve_package() -> None:
    """The import costs each Serve replica seconds and 124 MB."""
    program = (
        "import sys; from reelway.serving.open_inference import client;"
        "client.load_messages().ModelInferRequest(); sys.exit('kserve' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


def test_remote_ranker_equals_the_local_one_on_ten_thousand_rows(
    release_fixture: ReleaseFixture, free_port: int
) -> None:
    async def difference(under_test: InProcessServer) -> float:
        largest = 0.0
        for seed in range(20):
            inputs = release_fixture.inputs(500, seed)
            remote = await under_test.ranker.score(inputs)
            assert remote.shape == (500, 8)
            largest = max(largest, float(np.abs(remote - release_fixture.outputs(inputs)).max()))
        return largest

    assert within(release_fixture, free_port, difference) <= 1e-6


def test_server_of_another_release_raises(release_fixture: ReleaseFixture, free_port: int) -> None:
    async def request_score(under_test: InProcessServer) -> None:
        with pytest.raises(ServingError, match="NOT_FOUND: model 'ranker' has no version"):
            await under_test.ranker.score(release_fixture.inputs(3))
        assert under_test.faults("refused") == 1

    within(release_fixture, free_port, request_score, release="b" * 64)


def test_stopped_server_raises_until_it_is_restarted(release_fixture: ReleaseFixture, free_port: int) -> None:
    async def stop_and_restart(under_test: InProcessServer) -> None:
        inputs = release_fixture.inputs(3)
        await under_test.ranker.score(inputs)
        await under_test.stop()
        start_s = time.monotonic()
        with pytest.raises(ServingError, match="is unreachable"):
            await under_test.ranker.score(inputs, 30.0)
        assert time.monotonic() - start_s < 15
        assert under_test.faults("gone") == 1
        await under_test.restart()
        deadline = time.monotonic() + 30
        while True:
            try:
                await under_test.ranker.score(inputs)
                return
            except ServingError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    within(release_fixture, free_port, stop_and_restart)


def test_silent_server_raises_at_the_deadline(release_fixture: ReleaseFixture) -> None:
    async def request_score(port: int) -> None:
        registry = CollectorRegistry()
        ranker = RemoteRanker(
            f"127.0.0.1:{port}", release_fixture.release, RemoteRankerMetrics(registry, release_fixture.release)
        )
        start_s = time.monotonic()
        with pytest.raises(TimeoutError, match="did not answer within the deadline"):
            await ranker.score(release_fixture.inputs(3), 0.3)
        assert 0.2 < time.monotonic() - start_s < 10
        assert registry.get_sample_value(
            "reelway_ranking_remote_faults_total", {"release": release_fixture.release[:SHORT_RELEASE], "kind": "late"}
        )
        await ranker.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(request_score(silent.getsockname()[1]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"raw_output_contents": []}, "not enough values"),
        ({"raw_output_contents": [b"x" * 95]}, "buffer size"),
        ({"raw_output_contents": [np.full((3, 8), np.nan, "<f4").tobytes()]}, "not finite"),
        ({"outputs": [{"name": "outputs", "datatype": "FP32", "shape": [2, 12]}]}, "expected FP32 of 3 rows"),
        ({"outputs": [{"name": "outputs", "datatype": "INT32", "shape": [3, 8]}]}, "expected FP32 of 3 rows"),
        (None, "Error parsing message"),
    ],
)
def test_unusable_response_raises(release_fixture: ReleaseFixture, change: dict[str, Any] | None, reason: str) -> None:
    right = {
        "outputs": [{"name": "outputs", "datatype": "FP32", "shape": [3, 8]}],
        "raw_output_contents": [np.zeros((3, 8), "<f4").tobytes()],
    }
    body = b"\xff" if change is None else messages.ModelInferResponse(**{**right, **change}).SerializeToString()

    async def respond(method: str, _body: bytes, _context: Any) -> bytes:
        if method == "ModelInfer":
            return body
        inputs = [spec.metadata() for spec in release_fixture.ranker.signature.inputs]
        metadata: bytes = messages.ModelMetadataResponse(name="ranker", inputs=inputs).SerializeToString()
        return metadata

    async def request_score() -> None:
        server = grpc.aio.server()
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(partial(respond, method))
            for method in ("ModelInfer", "ModelMetadata")
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        registry = CollectorRegistry()
        ranker = RemoteRanker(
            f"127.0.0.1:{port}", release_fixture.release, RemoteRankerMetrics(registry, release_fixture.release)
        )
        with pytest.raises(ServingError, match=reason):
            await ranker.score(release_fixture.inputs(3))
        labels = {"release": release_fixture.release[:SHORT_RELEASE], "kind": "wrong"}
        assert registry.get_sample_value("reelway_ranking_remote_faults_total", labels) == 1
        await ranker.close()
        await server.stop(0)

    asyncio.run(request_score())


def test_full_server_counts_as_busy(release_fixture: ReleaseFixture, free_port: int) -> None:
    class FullService(RankerService):
        async def submit(self, work: Any, within_s: float | None = None) -> Any:  # noqa: ARG002
            raise ServerBusyError("33 requests are in flight")

    async def request_score(under_test: InProcessServer) -> None:
        with pytest.raises(ServingError, match="RESOURCE_EXHAUSTED: 33 requests"):
            await under_test.ranker.score(release_fixture.inputs(3))
        assert (under_test.faults("busy"), under_test.faults("refused")) == (1, 0)

    within(release_fixture, free_port, request_score, service_class=FullService)


def test_request_path_falls_back_while_its_ranker_is_down(release_fixture: ReleaseFixture, free_port: int) -> None:
    loader = ReleaseLoader(release_fixture.folder)

    async def stop_and_restart(under_test: InProcessServer) -> None:
        registry = CollectorRegistry()
        stages = loader.stages()
        remote = LocalStages(stages.retrieval, loader.ranking(under_test.ranker), stages.reranking)
        signer = TokenSigner(b"a secret of the tests, long enough")
        path = RequestPath(loader.router_release(), remote, signer, IngressMetrics(registry))
        local = RequestPath(loader.router_release(), stages, signer, IngressMetrics(CollectorRegistry()))
        request = RecommendRequest(viewer_id=1, count=10)

        async def answer(of: RequestPath = path) -> Recommendation:
            return await of.recommend(request, {}, NOW_S)

        recovered = await answer()
        assert recovered.response.degraded == []
        assert [v.score for v in recovered.response.videos] == pytest.approx(
            [v.score for v in (await answer(local)).response.videos], abs=1e-6
        )
        await under_test.stop()
        without = await answer()
        assert without.response.degraded == ["no_ranker"]
        assert len(without.response.videos) == 10
        labels = {"release": loader.release_id()[:SHORT_RELEASE], "arm": "stable", "rung": "no_ranker"}
        assert registry.get_sample_value("reelway_ingress_degraded_total", labels) == 1
        await under_test.restart()
        deadline = time.monotonic() + 30
        while (await answer()).response.degraded:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    within(release_fixture, free_port, stop_and_restart)
