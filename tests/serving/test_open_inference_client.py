"""A release's graph with its ranker elsewhere: the same values, and a slate whatever becomes of that server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from tests.release_files import NOW_S
from tests.serving.rank_server import MadeRelease, make_release

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.errors import ServingError
from reelway.platform.tokens import TokenSigner
from reelway.serving.metrics import SHORT, IngressMetrics, RemoteRankerMetrics
from reelway.serving.open_inference import messages
from reelway.serving.open_inference.client import RankerThere, address_of
from reelway.serving.open_inference.model import LoadedRanker, ServedRanker
from reelway.serving.open_inference.refusals import BusyError, LateError, NotReadyError
from reelway.serving.open_inference.rpc import RpcMethods
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import LocalStages, Recommendation, RequestPath

Work = Callable[["Here"], Coroutine[Any, Any, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRelease:
    return make_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Here:
    """A gRPC server of this process's event loop, and a ranker that asks it."""

    made: MadeRelease
    port: int
    server: Any
    ranker: RankerThere
    registry: CollectorRegistry

    def faults(self, kind: str) -> float:
        labels = {"release": self.made.release[:SHORT], "kind": kind}
        return self.registry.get_sample_value("reelway_ranking_remote_faults_total", labels) or 0.0

    async def restart(self) -> None:
        self.server = await started(self.made, self.port)


async def started(
    made: MadeRelease, port: int, release: str | None = None, methods: type[RpcMethods] = RpcMethods
) -> Any:
    """A server of the release's ranker that says it is another release when told to."""
    served = ServedRanker(release or made.release, CollectorRegistry())
    await served.begin(made.ranker)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((methods(served).handler(),))
    deadline = time.monotonic() + 10
    while True:
        try:
            assert server.add_insecure_port(f"127.0.0.1:{port}")
            break
        except RuntimeError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    await server.start()
    return server


def within(made: MadeRelease, port: int, work: Work, **settings: Any) -> Any:
    """Run the work beside a server at the port."""

    async def all_of_it() -> Any:
        registry = CollectorRegistry()
        ranker = RankerThere(f"127.0.0.1:{port}", made.release, RemoteRankerMetrics(registry, made.release))
        here = Here(made, port, await started(made, port, **settings), ranker, registry)
        try:
            return await work(here)
        finally:
            await ranker.close()
            await here.server.stop(0)

    return asyncio.run(all_of_it())


def test_an_address_names_the_release() -> None:
    assert address_of("reelway-{release}-predictor:8081", "a" * 64) == f"reelway-{'a' * SHORT}-predictor:8081"
    assert address_of("ranker:8081", "a" * 64) == "ranker:8081"


def test_ten_thousand_rows_have_the_values_of_the_ranker_in_the_graph(made: MadeRelease, free_port: int) -> None:
    async def difference(here: Here) -> float:
        largest = 0.0
        for seed in range(20):
            inputs = made.inputs(500, seed)
            there = await here.ranker.score(inputs)
            assert there.shape == (500, 8)
            largest = max(largest, float(np.abs(there - made.outputs(inputs)).max()))
        return largest

    assert within(made, free_port, difference) <= 1e-6


def test_a_server_of_another_release_gives_no_answer(made: MadeRelease, free_port: int) -> None:
    async def ask(here: Here) -> None:
        with pytest.raises(ServingError, match="NOT_FOUND: model 'ranker' has no version"):
            await here.ranker.score(made.inputs(3))
        assert here.faults("refused") == 1

    within(made, free_port, ask, release="b" * 64)


def test_a_server_that_is_gone_is_an_error_at_once_and_found_again_when_it_is_back(
    made: MadeRelease, free_port: int
) -> None:
    async def lose_and_find(here: Here) -> None:
        inputs = made.inputs(3)
        await here.ranker.score(inputs)
        await here.server.stop(0)
        begun = time.monotonic()
        with pytest.raises(ServingError, match="is gone"):
            await here.ranker.score(inputs, 30.0)
        assert time.monotonic() - begun < 15
        assert here.faults("gone") == 1
        await here.restart()
        deadline = time.monotonic() + 30
        while True:
            try:
                await here.ranker.score(inputs)
                return
            except ServingError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    within(made, free_port, lose_and_find)


def test_a_server_that_takes_the_connection_and_says_nothing_is_late_and_not_waited_for(made: MadeRelease) -> None:
    async def ask(port: int) -> None:
        registry = CollectorRegistry()
        ranker = RankerThere(f"127.0.0.1:{port}", made.release, RemoteRankerMetrics(registry, made.release))
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="is late"):
            await ranker.score(made.inputs(3), 0.3)
        assert 0.2 < time.monotonic() - begun < 10
        assert registry.get_sample_value(
            "reelway_ranking_remote_faults_total", {"release": made.release[:SHORT], "kind": "late"}
        )
        await ranker.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(ask(silent.getsockname()[1]))


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
def test_an_answer_that_is_none_is_counted_and_nothing_is_ordered_by_it(
    made: MadeRelease, free_port: int, change: dict[str, Any] | None, reason: str
) -> None:
    right = {
        "outputs": [{"name": "outputs", "datatype": "FP32", "shape": [3, 8]}],
        "raw_output_contents": [np.zeros((3, 8), "<f4").tobytes()],
    }
    body = b"\xff" if change is None else messages.ModelInferResponse(**{**right, **change}).SerializeToString()

    class Liar(RpcMethods):
        async def _infer(self, _request: bytes, _within_s: float | None) -> Any:
            return SimpleNamespace(SerializeToString=lambda: body)

    async def ask(here: Here) -> None:
        with pytest.raises(ServingError, match=reason):
            await here.ranker.score(made.inputs(3))
        assert here.faults("wrong") == 1

    within(made, free_port, ask, methods=Liar)


def test_a_server_that_has_no_room_is_counted_as_busy(made: MadeRelease, free_port: int) -> None:
    class Full(RpcMethods):
        async def _infer(self, _request: bytes, _within_s: float | None) -> Any:
            raise BusyError("33 requests are under way")

    async def ask(here: Here) -> None:
        with pytest.raises(ServingError, match="RESOURCE_EXHAUSTED: 33 requests"):
            await here.ranker.score(made.inputs(3))
        assert (here.faults("busy"), here.faults("refused")) == (1, 0)

    within(made, free_port, ask, methods=Full)


def test_the_graph_answers_whole_slates_without_its_ranker_and_counts_them(made: MadeRelease, free_port: int) -> None:
    loader = ReleaseLoader(made.folder)

    async def lose_and_find(here: Here) -> None:
        registry = CollectorRegistry()
        stages = loader.stages()
        there = LocalStages(stages.retrieval, loader.ranking(here.ranker), stages.reranking)
        signer = TokenSigner(b"a secret of the tests, long enough")
        path = RequestPath(loader.edge(), there, signer, IngressMetrics(registry))
        local = RequestPath(loader.edge(), stages, signer, IngressMetrics(CollectorRegistry()))
        request = RecommendRequest(viewer_id=1, count=10)

        async def answer(of: RequestPath = path) -> Recommendation:
            return await of.recommend(request, {}, NOW_S)

        whole = await answer()
        assert whole.response.degraded == []
        assert [v.score for v in whole.response.videos] == pytest.approx(
            [v.score for v in (await answer(local)).response.videos], abs=1e-6
        )
        await here.server.stop(0)
        without = await answer()
        assert without.response.degraded == ["no_ranker"]
        assert len(without.video_ids) == 10
        labels = {"release": loader.release_id()[:SHORT], "arm": "stable", "rung": "no_ranker"}
        assert registry.get_sample_value("reelway_ingress_degraded_total", labels) == 1
        await here.restart()
        deadline = time.monotonic() + 30
        while (await answer()).response.degraded:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    within(made, free_port, lose_and_find)


def test_what_cannot_be_answered_soon_is_sent_away_and_what_is_late_is_not_begun(made: MadeRelease) -> None:
    async def ask() -> list[Any]:
        loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        served = ServedRanker(made.release, CollectorRegistry(), threads=1, waiting=1)
        with pytest.raises(NotReadyError):
            await served.answer(lambda _: (0, None))
        await served.begin(LoadedRanker(made.folder, candidates=10))
        worked: list[str] = []

        def slow(_: LoadedRanker) -> tuple[int, str]:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
            return 1, "slow"

        def quick(_: LoadedRanker) -> tuple[int, str]:
            worked.append("quick")
            return 1, "quick"

        first = asyncio.create_task(served.answer(slow))
        await begun.wait()
        late = asyncio.create_task(served.answer(quick, within_s=0.01))
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="2 requests are under way, expected at most 2"):
            await served.answer(quick)
        await asyncio.sleep(0.02)
        go_on.set()
        assert await first == "slow"
        with pytest.raises(LateError):
            await late
        assert worked == []
        assert await served.answer(quick) == "quick"
        counted = [
            served.registry.get_sample_value(
                "reelway_ranking_server_requests_total", {"release": made.release[:SHORT], "outcome": outcome}
            )
            for outcome in ("ok", "busy", "late", "not_ready")
        ]
        served.close()
        return counted

    assert asyncio.run(ask()) == [2, 1, 1, 1]


def test_ready_is_said_only_between_the_first_call_and_the_end(made: MadeRelease) -> None:
    async def live() -> list[bool]:
        served = ServedRanker(made.release, CollectorRegistry())
        seen = [served.ready]
        await served.begin(LoadedRanker(made.folder, candidates=10))
        seen.append(served.ready)
        served.end()
        seen.append(served.ready)
        assert await served.answer(lambda _: (1, "still")) == "still"
        served.close()
        return seen

    assert asyncio.run(live()) == [False, True, False]


def test_a_ranker_whose_first_call_fails_is_never_ready(made: MadeRelease) -> None:
    class Broken(LoadedRanker):
        def run(self, inputs: Any) -> Any:
            raise RuntimeError(f"broken for {len(inputs)} inputs")

    async def begin() -> bool:
        served = ServedRanker(made.release, CollectorRegistry())
        with pytest.raises(RuntimeError):
            await served.begin(Broken(made.folder, candidates=10))
        served.close()
        return served.ready

    assert asyncio.run(begin()) is False
