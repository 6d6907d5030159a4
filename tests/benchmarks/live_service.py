"""The installation of the live benchmark: Kafka, Redis, the stream's processes, and a replica in this process.

All processes share the machine's cores with the benchmark.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import psutil
from confluent_kafka.admin import NewTopic
from tests.benchmarks.serving_fixture import ServingFixture, make_serving_fixture, online_store
from tests.support.dimensions import DIMENSIONS
from tests.support.eventlog.kafka_broker import Broker, kafka_broker
from tests.support.pipelines.stream_members import write_stream_inputs

from reelway.pipelines.features.views import ViewSettings
from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.events import Arm
from reelway.platform.eventlog.catalogue_log import CataloguePublisher
from reelway.platform.eventlog.kafka_topics import TopicSizes, required_topics
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.rollout.traffic.bucketing import BUCKETS
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.rollout.traffic.serving_options import RouterArgs
from reelway.platform.run_directory import RunDirectory
from reelway.serving.deployments.applications import RouterDeployment
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router

SIZES: Final = TopicSizes(viewer_partitions=4, video_partitions=3, replication=1, min_in_sync=1)
SETTLED_S: Final = 60.0


class ObservedRouter(RouterDeployment):
    """A replica of the router. ``opened`` is its release."""

    opened: OpenRelease

    async def _open(self, release: str) -> OpenRelease:
        self.opened = await super()._open(release)
        return self.opened


@dataclass(frozen=True)
class LiveService:
    """Folders and addresses of the installation."""

    fixture: ServingFixture
    broker: Broker
    events: str

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.fixture.path)

    def routing(self) -> Routing:
        """Returns a routing that sends all traffic to the release."""
        return Routing(salt="s", arms=(ArmRoute(arm=Arm.STABLE, release=self.fixture.release, weight_bp=BUCKETS),))

    @asynccontextmanager
    async def replica(self) -> AsyncIterator[ObservedRouter]:
        """Runs a router with the stages in this process, and everything live on."""
        run = self.run
        router = ObservedRouter(
            RouterArgs(
                release_store=str(run.release_store),
                release_cache=run.path / "serving" / "releases",
                public_keys=run.keys,
                overlay=str(run.overlay),
                token_secrets=run.path / "token.secret",
                features_dir=run.features,
                composition="fused",
                events=self.events,
            )
        )
        try:
            await router.reconfigure(self.routing().model_dump(mode="json"))
            await settle(router)
            yield router
        finally:
            await asyncio.to_thread(router.close)
            if router._takedowns:
                router._takedowns.stop()
            if router._shown:
                await asyncio.to_thread(router._shown.close)

    @contextmanager
    def viewer_rows(self) -> Iterator[ViewerRowReader]:
        """Yields the reader with which a router reads viewers from Redis."""
        yield ViewerRowReader(open_feature_store(self.run.features))

    @contextmanager
    def publisher(self) -> Iterator[CataloguePublisher]:
        """Yields a publisher of uploads and takedowns."""
        with closing(CataloguePublisher(self.events)) as publisher:
            yield publisher

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Runs ``reelway stream``, hosted on Quix Streams, in a process of its own."""
        state = str(self.run.path / "stream-state")
        with self._command("stream", "--run", str(self.run.path), "--events", self.events, "--state", state):
            yield

    @contextmanager
    def overlay_writer(self) -> Iterator[None]:
        """Runs ``reelway stream overlay`` in a process of its own."""
        with self._command("stream", "overlay", "--run", str(self.run.path), "--events", self.events):
            yield

    @contextmanager
    def _command(self, *arguments: str) -> Iterator[None]:
        name = "-".join(arguments[:2]).replace("---run", "")
        with child([sys.executable, "-m", "reelway.platform.cli", *arguments], self.run.path / f"{name}.log"):
            yield


@contextmanager
def live_service(path: Path, videos: int) -> Iterator[LiveService]:
    """Starts broker and Redis and makes a release of so many videos."""
    (path / "kafka").mkdir(parents=True)
    fixture = make_serving_fixture(path / "run", videos)
    write_stream_inputs(RunDirectory(fixture.path), ViewSettings(DIMENSIONS))
    with kafka_broker(path / "kafka") as broker, online_store(fixture) as address:
        if not address.startswith("redis"):
            raise SystemExit("no redis-server on the PATH; `make system-packages` installs it")
        events = f"kafka://{broker.servers}/live{uuid4().hex[:6]}-"
        topics = required_topics(events, SIZES).values()
        new = [NewTopic(topic.name, topic.partitions, 1, config=dict(topic.settings)) for topic in topics]
        for future in broker.admin.create_topics(new).values():
            future.result(30)
        yield LiveService(fixture, broker, events)


@contextmanager
def own_core() -> Iterator[None]:
    """Leaves one core to this process, and the others to its children, as if these ran on other machines."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this part needs two cores: one for the replica, and one for everything else")
    this = psutil.Process()
    children = [thread.id for process in this.children(recursive=True) for thread in process.threads()]
    try:
        _pin([thread.id for thread in this.threads()], cores[:1])
        _pin(children, cores[1:])
        yield
    finally:
        _pin([thread.id for thread in this.threads()], cores)


def _pin(threads: Sequence[int], cores: Sequence[int]) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


@contextmanager
def child(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process; ends it with SIGTERM, and with SIGKILL if that has no effect.

    Raises:
        SystemExit: if the process ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                status = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
    if status:
        raise SystemExit(f"`{' '.join(command)}` ended with {status}:\n{log.read_text(errors='replace')[-3000:]}")


async def settle(router: Router) -> None:
    """Requests slates until no stage of twenty in a row was late: a process's first calls load what they use.

    Raises:
        SystemExit: if slates are still degraded after ``SETTLED_S``.
    """
    deadline, whole = time.monotonic() + SETTLED_S, 0
    while whole < 20:
        answer = await router.recommend(RecommendRequest(viewer_id=10**8 + whole, count=10))
        whole = 0 if answer.response.degraded else whole + 1
        if time.monotonic() > deadline:
            raise SystemExit(f"slates are degraded after {SETTLED_S:g} s: {answer.response.degraded}")
        await asyncio.sleep(0.01)


async def until(what: str, holds: Callable[[], bool], timeout_s: float = 60.0, every_s: float = 0.02) -> float:
    """Waits until a condition holds and returns the monotonic time at which it did.

    Raises:
        SystemExit: if it does not hold within the time.
    """
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(every_s)
    return time.monotonic()
