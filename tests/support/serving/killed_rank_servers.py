"""Kills the rank servers of two releases under load and asserts that no request fails.

The servers are processes that SIGKILL ends, so nothing is drained. This is a program and not a test module, because Ray
reads its token and its authentication mode once per process.

Usage: python -m tests.support.serving.killed_rank_servers FOLDER
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from tests.support.constant_load import constant_load, read_record
from tests.support.serving.rank_server import RankServerProcess, rank_server_process
from tests.support.serving.served_run import make_run

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.rollout.traffic.serve_config import compose_serve_config
from reelway.platform.rollout.traffic.serve_rest import ServeAddress, ServeRestBackend
from reelway.platform.rollout.traffic.serving_options import ReleaseStoreArgs, ServingOptions
from reelway.platform.rollout.traffic.target import TrafficTarget
from reelway.serving.free_ports import find_free_port

RATE = 15.0
VIEWERS = 1000
WAIT_TIMEOUT_S = 90.0


@dataclass
class ServingScenario:
    """A running service with load, and the steps of a rollout."""

    stable: str
    canary: str
    backend: ServeRestBackend
    client: httpx.Client
    record: Path

    def set_canary_weight(self, weight_bp: int) -> float:
        """Applies one step of a rollout. Returns the time at which all routers use it."""
        arms = [ArmRoute(arm=Arm.CANARY, release=self.canary, weight_bp=weight_bp)] if weight_bp else []
        if weight_bp < 10_000:
            arms.append(ArmRoute(arm=Arm.STABLE, release=self.stable, weight_bp=10_000 - weight_bp))
        both = (self.stable, self.canary)
        routing = Routing(salt="ranked elsewhere", rollout="r1", arms=tuple(arms), warm=both)
        self.backend.observe()
        self.backend.apply(TrafficTarget(routing, both))
        wait_for(lambda: self.backend.observe().routing == routing, "the routers do not use the step")
        return time.time()

    def answers(self, release: str, since: float = 0.0) -> NDArray[np.void]:
        """Returns the responses of a release to requests sent after ``since``."""
        rows = read_record(self.record)
        return rows[(rows["release"] == release[:12].encode()) & (rows["sent"] > since)]

    def metric(self, name: str, **labels: str) -> float:
        samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", self.client.get("/metrics").text, re.M)
        return sum(float(v) for series, v in samples if all(f'{k}="{w}"' in series for k, w in labels.items()))

    def wait_until_ranked(self, release: str) -> None:
        """Waits until ten consecutive responses of a release are ranked."""

        def ranked() -> bool:
            last = self.answers(release)[-10:]
            return len(last) == 10 and not last["degraded"].any() and last["sent"].min() > since

        since = time.time()
        wait_for(ranked, f"{release[:12]} is not ranked")

    def wait_until_unranked(self, release: str, since: float) -> None:
        """Waits until ten responses of a release are without its ranker."""
        wait_for(lambda: self.answers(release, since)["degraded"].sum() >= 10, f"{release[:12]} is still ranked")


@contextmanager
def serving_scenario(run: Path, stable: str, canary: str, addresses: dict[str, str]) -> Iterator[ServingScenario]:
    """Runs the service under load, with both releases warm and all traffic on stable."""
    from reelway.serving.deployments.local_serve import deploy, running_service

    (run / "token.secret").write_bytes(b"the secret of the tests' tokens")
    options = ServingOptions(
        releases=store_args_of(run), metrics_dir=run / "metrics", token_secrets=run / "token.secret",
        features_dir=run / "features", port=find_free_port("127.0.0.1"),
    )  # fmt: skip
    both = Routing(
        salt="ranked elsewhere", rollout="r0", arms=Routing.single_release(stable).arms, warm=(stable, canary)
    )
    with ExitStack() as stack:
        service = stack.enter_context(running_service(Routing.single_release(stable), options, run / "ray.token"))
        document = compose_serve_config(options, both.releases, both)
        for application in document["applications"]:
            if application["name"] in addresses:
                application["args"]["ranker_address"] = addresses[application["name"]]
        deploy(service, document)
        address = ServeAddress(service.internal_url, service.serve_api, service.token)
        backend = stack.enter_context(closing(ServeRestBackend(address)))
        client = stack.enter_context(httpx.Client(base_url=service.internal_url, timeout=30))
        stack.enter_context(constant_load(service.url, run / "record", rate=RATE, viewers=VIEWERS))
        yield ServingScenario(stable, canary, backend, client, run / "record")


def store_args_of(run: Path) -> ReleaseStoreArgs:
    return ReleaseStoreArgs(release_store=str(run / "releases"), release_cache=run / "cache", public_keys=run / "keys")


def kill(server: RankServerProcess) -> float:
    moment = time.time()
    server.process.kill()
    server.process.wait()
    return moment


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def main(run: Path) -> None:
    """Kills servers during a rollout, a rollback and another rollout."""
    stable, canary, _ = make_run(run)
    ports = {release: find_free_port("127.0.0.1") for release in (stable, canary)}
    addresses = {release: f"127.0.0.1:{port}" for release, port in ports.items()}

    def server(release: str, port: int) -> RankServerProcess:
        return stack.enter_context(rank_server_process(store_args_of(run), release, run, grpc_port=port))

    with ExitStack() as stack:
        servers = {release: server(release, port) for release, port in ports.items()}
        scenario = stack.enter_context(serving_scenario(run, stable, canary, addresses))
        scenario.wait_until_ranked(stable)
        scenario.set_canary_weight(5000)
        scenario.wait_until_ranked(canary)

        killed = kill(servers[canary])
        scenario.wait_until_unranked(canary, killed)
        rolled_back_s = scenario.set_canary_weight(0)  # a rollback is a weight write
        scenario.wait_until_ranked(stable)
        assert not scenario.answers(stable, killed)["degraded"].any()
        assert not len(scenario.answers(canary, rolled_back_s + 1.0))

        servers[canary] = server(canary, ports[canary])
        scenario.set_canary_weight(10_000)
        scenario.wait_until_ranked(canary)  # the client has found the restarted ranker at the same address
        kill(servers[stable])
        scenario.wait_until_ranked(canary)  # no traffic uses stable any more
        killed = kill(servers[canary])
        scenario.wait_until_unranked(canary, killed)
        server(canary, ports[canary])
        scenario.wait_until_ranked(canary)

        rows = read_record(scenario.record)
        without = {release: int(scenario.answers(release)["degraded"].sum()) for release in (stable, canary)}
        counted = {
            release: scenario.metric("reelway_ingress_degraded_total", release=release[:12], rung="no_ranker")
            for release in (stable, canary)
        }
        faults = scenario.metric("reelway_ranking_remote_faults_total", release=canary[:12])
    failed = int((rows["status"] != 200).sum())
    print(json.dumps({"requests": len(rows), "failed": failed, "without ranker": sum(without.values())}))
    assert failed == 0
    assert without[stable] == 0
    assert counted[canary] >= without[canary] >= 20
    assert counted[stable] == 0
    assert faults >= without[canary] / 2  # a stage that is late repeatedly pauses and makes no calls


if __name__ == "__main__":
    main(Path(sys.argv[1]))
