"""A full disk, a full Redis, a slow Kafka: accepted outcomes are in the log, and every request gets a slate.

The router is a whole one behind real HTTP; the stores are real.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import redis
from prometheus_client import CollectorRegistry
from tests.support.eventlog.kafka_broker import Broker
from tests.support.redis_server import running_redis
from tests.support.release_files import make_release_folder
from tests.support.serving.caller_access import open_access
from tests.support.small_disk import SmallDisk, small_disk

from reelway.platform.eventlog.kafka_topics import TopicSizes, create_missing_topics
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.vector_segments import open_vector_log
from reelway.platform.features.viewer_memory import ViewerMemory
from reelway.platform.features.viewer_memory_redis import RedisViewerMemory
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory
from reelway.platform.features.viewer_rows import StoredViewer
from reelway.platform.rollout.control.webhook import serve_in_thread
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.tokens import TokenSigner
from reelway.serving.fused import open_fused
from reelway.serving.http_api import OUTCOMES, RECOMMEND, build_http_api
from reelway.serving.metrics import IntakeMetrics
from reelway.serving.outcomes import EventLogWriter, ExposureWriter, OutcomeIntake
from reelway.serving.outcomes.exposures import SlateExposure
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies

SIGNER = TokenSigner(b"a secret of the tests, long enough")
WITHIN_S = 30.0


class Service:
    """A router with stores, its client, and what it accepted."""

    def __init__(self, url: str, events: str, registry: CollectorRegistry) -> None:
        self.events, self.registry = events, registry
        self.client = httpx.Client(base_url=url, timeout=2 * WITHIN_S, limits=httpx.Limits(max_connections=None))
        self.accepted: set[int] = set()

    def slate(self, viewer: int = 1) -> dict[str, Any]:
        answer = self.client.post(RECOMMEND, json={"viewer_id": viewer, "count": 10})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["videos"]) == 10
        body: dict[str, Any] = answer.json()
        return body

    def report(self, slate: dict[str, Any], kind: str = "like", value: float | None = None) -> int:
        """Reports an outcome of each video of a slate. Returns the status; accepted ones are remembered."""
        tokens = [video["token"] for video in slate["videos"]]
        outcomes = [{"token": token, "type": kind} | ({} if value is None else {"value": value}) for token in tokens]
        answer = self.client.post(OUTCOMES, json={"outcomes": outcomes})
        if answer.status_code == 200:
            assert answer.json()["accepted"] == len(tokens)
            self.accepted |= {SIGNER.read(token).impression_id for token in tokens}
        else:
            assert answer.headers["Retry-After"]
            assert set(answer.json()) == {"error", "fields"}
        return answer.status_code

    def logged(self) -> list[int]:
        """The impressions of all outcomes in the log, in their order."""
        ids: list[int] = []
        with closing(open_topic(self.events, Topic.OUTCOMES)) as log:
            position: dict[int, int] = {}
            while records := (batch := log.read(position, limit=1_000, wait_s=1.0)).records:
                position = dict(batch.next_offsets)
                tables = [decode_outcomes(record.payload) for record in records]
                ids += pa.concat_tables(table.select(["impression_id"]) for table in tables)[0].to_pylist()
        return ids

    def metric(self, name: str) -> float:
        samples = [sample for family in self.registry.collect() for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> ReleaseLoader:
    folder = tmp_path_factory.mktemp("release")
    make_release_folder(folder, videos=300)
    return ReleaseLoader(folder)


@contextmanager
def running_service(
    loader: ReleaseLoader, events: str, memory: ViewerMemory | None = None, vectors: Path | None = None
) -> Iterator[Service]:
    """Runs a router until the block is left. Without a memory the viewers are unknown."""
    registry, lost = CollectorRegistry(), []

    async def open_release(_: str) -> OpenRelease:
        return open_fused(loader, budget_ms=5_000)

    def read_viewer(viewer: int) -> StoredViewer:
        assert memory is not None
        return StoredViewer({"region": "eu"}, memory.read(viewer))

    def lose(exposure: SlateExposure) -> None:
        lost.append(exposure)
        router.count_lost_exposure(exposure)

    counts = IntakeMetrics(registry)
    writer = EventLogWriter(partial(open_topic, events, Topic.OUTCOMES), on_repeated=counts.repeated.inc)
    sample = vectors and ParitySampler(open_vector_log(str(vectors), ratio=1.0), ThreadPoolExecutor(1))
    parts = RouterDependencies(
        SIGNER, registry, read_viewer if memory else None, memory, 5_000, sample or None,
        ExposureWriter(partial(open_topic, events, Topic.EXPOSURES), lose, retry_for_s=1.0),
        OutcomeIntake(SIGNER, writer, counts, memory),
    )  # fmt: skip
    router = Router(open_release, parts)
    asyncio.run(router.reconfigure(Routing.single_release("a" * 64).model_dump(mode="json")))
    with ExitStack() as stack:
        stack.callback(router.close)
        stack.enter_context(closing(sample) if sample else ExitStack())
        url = stack.enter_context(serve_in_thread(build_http_api(router, open_access()), "127.0.0.1", 0))
        service = Service(url, events, registry)
        stack.enter_context(closing(service.client))
        yield service


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", size_mb=8) as mounted:
        yield mounted


def test_full_disk_loses_no_accepted_outcome_and_no_slate(loader: ReleaseLoader, disk: SmallDisk) -> None:
    """The event log, the viewers' memory and the vector log are on the disk that is full."""
    with closing(SqliteViewerMemory(disk.folder / "memory.db")) as memory:
        with running_service(loader, str(disk.folder / "events"), memory, disk.folder / "vectors.jsonl") as service:
            assert service.report(service.slate()) == 200
            disk.fill()
            statuses = [service.report(service.slate(viewer)) for viewer in range(2, 400)]
            assert set(statuses[-20:]) == {503}
            assert service.metric("reelway_ingress_parity_samples_lost_total") > 0
            wait_for(lambda: service.metric("reelway_ingress_exposures_lost_total") > 0, "no lost slate is counted")
            disk.free()
            wait_for(lambda: service.report(service.slate(500)) == 200, "the log accepts nothing again")
        logged = service.logged()
    assert service.accepted <= set(logged)
    assert len(logged) == len(set(logged))


@pytest.mark.redis
def test_full_redis_delays_memories_but_no_slate_and_no_outcome(loader: ReleaseLoader, tmp_path: Path) -> None:
    with running_redis(tmp_path) as address:
        host, _, port = address.partition(":")
        client = redis.Redis(host=host, port=int(port), protocol=3)
        with running_service(loader, str(tmp_path / "events"), RedisViewerMemory(client)) as service:
            client.config_set("maxmemory", 1)  # noeviction is Redis's default: it refuses writes and answers reads
            slate = service.slate()
            assert slate["degraded"] == []
            assert service.report(slate, "watch", 3_600_000.0) == 200
            assert service.metric("reelway_outcomes_memory_failures_total") == 1
            wait_for(lambda: service.metric("reelway_ingress_memory_faults_total") > 0, "no failed write of the memory")
            again = service.slate()
            assert not {v["video_id"] for v in slate["videos"]} & {v["video_id"] for v in again["videos"]}
            client.config_set("maxmemory", 0)
            shown = {video["video_id"] for one in (slate, again) for video in one["videos"]}
            wait_for(
                lambda: shown <= set(RedisViewerMemory(client).read(1).shown_ids.tolist()), "the memory is not written"
            )
        assert service.accepted == set(service.logged())
        client.close()


@pytest.mark.kafka
@pytest.mark.slow
def test_slow_kafka_delays_outcomes_and_loses_none(loader: ReleaseLoader, broker: Broker) -> None:
    if not broker.can_be_killed:
        pytest.skip("the broker is not the tests' own")
    prefix = f"t{time.time_ns():x}-"
    events = f"kafka://{broker.servers}/{prefix}"
    create_missing_topics(events, TopicSizes(2, 1, replication=1, min_in_sync=1))
    with running_service(loader, events) as service:
        assert service.report(service.slate()) == 200
        with broker.paused():
            statuses: list[int] = []
            waiting = [
                threading.Thread(target=lambda slate=slate: statuses.append(service.report(slate)))
                for slate in [service.slate(viewer) for viewer in range(2, 182)]
            ]
            for thread in waiting:
                thread.start()
            wait_for(lambda: statuses.count(503) >= 20, "requests beyond the limit are not refused at once")
            began = time.monotonic()
            for viewer in range(20):
                service.slate(viewer)
            assert time.monotonic() - began < 10, "slates wait for the event log"
        for thread in waiting:
            thread.join(60)
        assert statuses.count(200) > 50, "the delayed outcomes are not accepted"
        assert [service.report(service.slate(viewer)) for viewer in range(200, 210)] == [200] * 10
        accepted = set(service.accepted)
    assert accepted <= set(service.logged())
