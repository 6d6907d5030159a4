"""The variants that the benchmark compares, each in a separate process, so that CPU and memory are measured separately.

Usage: python -m tests.benchmarks.serving_variants staged|fused|naive|floor FOLDER [SECONDS or SETTINGS]

A service prints its address as one line of JSON and runs until the end of standard input. ``floor`` answers requests
sequentially for the given time and prints their number: the same arithmetic in one process, without a service.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.benchmarks.serving_fixture import AUDIENCE, SECRET, VIEWERS, ServingFixture
from tests.support.release_files import NOW_S

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serving_options import ReleaseStoreArgs
from reelway.platform.tokens import TokenSigner

COUNT = 20
REPLICA = "ray::ServeReplica"


@dataclass(frozen=True)
class Variant:
    """A running service."""

    url: str
    process: psutil.Process
    internal_url: str = ""
    """URL of the internal API; empty for a service without one."""

    def cpu_s(self) -> float:
        """Returns the CPU seconds of all processes of the service, Ray's processes included."""
        return sum(times.user + times.system for _, times in self._each("cpu_times"))

    def cpu_by_process(self) -> dict[str, float]:
        """Returns the CPU seconds of each replica, of HAProxy, and of everything else that Ray runs."""
        found: dict[str, float] = {}
        for process, times in self._each("cpu_times"):
            with suppress(psutil.NoSuchProcess):
                name = _part(process)
                found[name] = found.get(name, 0.0) + times.user + times.system
        return found

    def replica_mb(self) -> dict[str, float]:
        """Returns the memory of each deployment's replica in MB (PSS: shared pages count proportionally)."""
        found: dict[str, float] = {}
        for process, memory in self._each("memory_full_info"):
            line = " ".join(process.cmdline())
            if line.startswith(REPLICA):
                found[_deployment(line)] = memory.pss / 1e6
        return found

    def _each(self, what: str) -> Iterator[tuple[psutil.Process, Any]]:
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                yield process, getattr(process, what)()
            except psutil.NoSuchProcess:
                continue


def _part(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if line.startswith(REPLICA):
        return _deployment(line)
    return "HAProxy" if "haproxy" in process.name() else "Ray's own processes"


def _deployment(command_line: str) -> str:
    return command_line.split()[0].rpartition(":")[2]


@contextmanager
def running(kind: str, fixture: Path, **settings: Any) -> Iterator[Variant]:
    """Runs a service of this kind while the block runs; the service answers when the block is entered."""
    command = [sys.executable, "-m", "tests.benchmarks.serving_variants", kind, str(fixture), json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"service {kind!r}: did not start; see its message above")
            printed = json.loads(line)
            yield Variant(printed["url"], psutil.Process(process.pid), printed.get("internal_url", ""))
        finally:
            process.stdin.close()


def floor_of(fixture: ServingFixture, *, from_store: bool = True) -> Callable[[int], int]:
    """Returns a function that answers request number i and returns the length of the JSON, 0 if it is degraded.

    Args:
        from_store: read the viewer's row from the online store, as a service does.
    """
    graph = fixture.loader().in_process_recommender(TokenSigner(SECRET))
    read: Callable[[int], Mapping[str, Any]] = fixture.viewer_rows().__getitem__
    if from_store:
        read = ViewerRowReader(open_feature_store(fixture.features)).read

    def answer(i: int) -> int:
        request = RecommendRequest(viewer_id=i % VIEWERS, count=COUNT)
        response = graph.recommend(request, read(request.viewer_id), NOW_S)
        return len(response.model_dump_json()) if not response.degraded and len(response.videos) == COUNT else 0

    return answer


def floor_per_s(fixture: ServingFixture, seconds: float, processes: int) -> float:
    """Returns the requests per second of ``processes`` processes, one per core if there are enough cores."""
    command = [sys.executable, "-m", "tests.benchmarks.serving_variants", "floor", str(fixture.path), str(seconds)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    counts = [json.loads(process.communicate()[0]) for process in started]
    return float(sum(one["requests"] / one["seconds"] for one in counts))


def _floor(fixture: ServingFixture, seconds: float) -> None:
    answer = floor_of(fixture)
    for i in range(20):
        answer(i)
    count, start = 0, time.monotonic()
    while (taken := time.monotonic() - start) < seconds:
        count += bool(answer(count))
    print(json.dumps({"requests": count, "seconds": taken}))


def _ours(kind: str, fixture: ServingFixture, settings: dict[str, Any]) -> None:
    from reelway.platform.rollout.traffic.access_options import AccessOptions, JwtOptions
    from reelway.platform.rollout.traffic.serving_options import Deployments, ServingOptions
    from reelway.serving.deployments.local_serve import running_service
    from reelway.serving.free_ports import find_free_port

    path = fixture.path
    releases = ReleaseStoreArgs(
        release_store=str(path / "releases"), release_cache=path / "cache", public_keys=path / "keys"
    )
    deployments = Deployments.with_replicas(**settings.pop("replicas", {}))
    if settings.pop("authenticated", False):
        without_limit = {"per_second": 1e6, "burst": 1_000_000}
        settings["access"] = AccessOptions(
            mode="jwt",
            jwt=JwtOptions(audience=AUDIENCE, keys_file=fixture.viewer_keys),
            per_viewer=without_limit,
            per_address=without_limit,
        )
    options = ServingOptions(
        releases=releases,
        metrics_dir=path / f"metrics-{kind}-{time.time_ns()}",
        token_secrets=path / "token.secret",
        features_dir=fixture.features,
        outcomes=path / f"outcomes-{kind}.db",
        port=find_free_port("127.0.0.1"),
        composition=kind,  # type: ignore[arg-type]
        deployments=deployments,
        **settings,
    )
    with running_service(Routing.single_release(fixture.release), options, path / "ray.token") as service:
        print(json.dumps({"url": service.url, "internal_url": service.internal_url}), flush=True)
        sys.stdin.read()


def main() -> None:
    kind, fixture = sys.argv[1], ServingFixture(Path(sys.argv[2]))
    if kind == "floor":
        _floor(fixture, float(sys.argv[3]))
    elif kind == "naive":
        from tests.benchmarks.serving_naive import serve_naive

        serve_naive(fixture)
    else:
        _ours(kind, fixture, json.loads(sys.argv[3]))


if __name__ == "__main__":
    main()
