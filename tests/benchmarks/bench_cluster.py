"""Measures rollbacks by webhook and recovery from a killed Ray head on a cluster with KubeRay, under load.

``python -m tests.benchmarks.bench_cluster``. Two installations run sequentially: Ray's state in the head, and in a
Redis. Each has one worker that serves and a head that does not. All times are from the clock of the pod that sends
the requests and the alerts.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from tests.support.bench_results import Row, write_report
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster, find_cluster
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.installation import NAME, Installation
from tests.support.e2e.load_pod import constant_load
from tests.support.e2e.redis_pod import apply_redis
from tests.support.e2e.release_fixtures import ReleaseFixtures, build_release_fixtures
from tests.support.e2e.rollouts import HELD, begin, wait_until_phase
from tests.support.e2e.shared_installation import SharedInstallation
from tests.support.e2e.wait_until import until

from reelway.platform.cli.terminal import print_status, progress

ROLLBACK_LIMIT_S = 2.0
RECOVERY_LIMIT_S = 60.0
OBSERVATION_S = 120.0
"""Observation time after a head is killed. A worker unknown to the new head serves for a while, then exits."""
NAMESPACE = "reelway-e2e-bench"
GCS = "gcs-store"
"""Name of the Redis pod."""
ONE_WORKER: dict[str, Any] = {
    "serving": {
        "head": {"cpus": 0},
        "workers": {
            "cpu": {
                "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "gpus": 0, "gpuResource": "nvidia.com/gpu",
                "resources": {
                    "requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "3Gi"},
                },
                "nodeSelector": {}, "tolerations": [], "affinity": {}, "topologySpreadConstraints": [],
            }
        },
    }
}  # fmt: skip
IN_REDIS: dict[str, Any] = {**ONE_WORKER, "ray": {"gcs": {"redisAddress": f"{GCS}:6379"}}}


def measure(cluster: Cluster, rounds: int, heads: int, rows: list[Row]) -> None:
    """Measures both installations. ``rows`` keeps what was measured if a later step fails."""
    with build_release_fixtures(cluster, 2) as releases:
        _measure_installation(cluster, releases, ONE_WORKER, "state in the head", rounds, heads, rows)
        _measure_installation(cluster, releases, IN_REDIS, "state in a Redis", 0, heads, rows)


def _measure_installation(
    cluster: Cluster,
    releases: ReleaseFixtures,
    values: dict[str, Any],
    variant: str,
    rounds: int,
    heads: int,
    rows: list[Row],
) -> None:
    with cluster.namespace(NAMESPACE) as kubectl:
        releases.deliver(kubectl)
        installation = Installation(cluster, kubectl, releases, given=values)
        with constant_load(kubectl, installation.url) as load:
            shared = SharedInstallation(installation, load, releases, rows, live=releases.ids[0])
            began = load.now()
            print_status(f"installing: {variant}")
            installation.install()
            try:
                if "ray" in values:
                    apply_redis(kubectl, GCS, f"{NAME}-secrets")
                first = load.wait_until_answered_by(shared.live, since=began, within_s=600) - began
                title = f"helm install to first slate ({variant}, one head and one worker)"
                shared.note(title, first, "s", "under 180", first < 180)
                installation.wait_until_ready()
                if rounds:
                    by_webhook(shared, rounds)
                    write_report("cluster", shared.rows)  # keeps these rows if the next minutes are interrupted
                for _ in range(heads):
                    head_killed(shared, variant)
            finally:
                installation.uninstall()
                _remove_finalizers(kubectl)


def _remove_finalizers(kubectl: Kubectl) -> None:
    """Removes finalizers, because KubeRay cannot create its clean-up Job in a namespace that is being deleted."""
    for name in kubectl.run("get", "rayclusters", "-o", "name").split():
        kubectl.run("patch", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


def by_webhook(shared: SharedInstallation, rounds: int) -> None:
    """Repeats a rollout that an alert rolls back. The release stays warm between rounds."""
    release, installation, load = shared.releases.ids[1], shared.installation, shared.load
    token = installation.webhook_token
    taken_s = []
    with expect_no_disruption(shared, f"{rounds} rollbacks by webhook"), progress() as bar:
        task = bar.add_task("webhook to stable", total=rounds)
        for number in range(rounds):
            began, name = load.now(), f"round-{number}"
            begin(shared.kubectl, name, release, HELD, force=True)
            load.wait_until_answered_by(release, since=began, within_s=180, count=5)
            alerted = load.alert(installation.webhook, token, release)
            wait_until_phase(shared.kubectl, name, "RolledBack")
            load.settled(since=alerted, before=load.now())
            sent = load.answers(release, since=alerted)["sent"]
            taken_s.append(float(sent.max() - alerted) if len(sent) else 0.0)
            bar.advance(task)
    p50, p99, worst = np.percentile(taken_s, [50, 99, 100])
    title = f"webhook to all new requests on stable, {rounds} rounds at {load.rate:g} requests/s"
    shared.note(f"{title}, p99", float(p99), "s", f"under {ROLLBACK_LIMIT_S:g}", bool(p99 < ROLLBACK_LIMIT_S))
    shared.note(f"{title}, p50", float(p50), "s")
    shared.note(f"{title}, worst", float(worst), "s")


def head_killed(shared: SharedInstallation, variant: str) -> None:
    """Kills the head without notice. Measures the time until slates return and the requests lost until recovery."""
    installation, load = shared.installation, shared.load
    before = installation.pods("serving")
    killed = load.now()
    shared.kubectl.run("delete", "pod", installation.head(), "--grace-period=0", "--force", "--wait=true")
    installation.wait_until_other_head(before)
    until("the observation time is over", lambda: load.now() > killed + OBSERVATION_S, OBSERVATION_S + 60)
    installation.wait_until_ready()
    load.wait_until_answered_by(shared.live, since=load.now(), within_s=240, count=20)
    rows = load.settled(since=killed, before=load.now())
    lost = rows[rows["status"] != 200]
    back = float(lost["sent"].max() - killed) if len(lost) else 0.0
    replaced = [name for name, seen in before.items() if installation.pods("serving").get(name) != seen]
    title = f"head pod killed, {variant}"
    shared.note(f"{title}: time until slates return", back, "s", f"under {RECOVERY_LIMIT_S:g}", back < RECOVERY_LIMIT_S)
    shared.note(f"{title}: failed requests of {len(rows)}, at {load.rate:g} requests/s", float(len(lost)), "requests")
    shared.note(f"{title}: replaced or restarted pods, including the head", float(len(replaced)), "pods")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="rollbacks by webhook (%(default)s)")
    parser.add_argument("--heads", type=int, default=1, help="head kills per installation (%(default)s)")
    options = parser.parse_args()
    cluster = find_cluster()
    if cluster is None:
        print("no cluster: start one with `make cluster`, or set KUBECONFIG and REELWAY_CLUSTER_TESTS=1")
        return 1
    rows: list[Row] = []
    try:
        measure(cluster, options.rounds, options.heads, rows)
    finally:
        write_report("cluster", rows)
        cluster.wait_until_deleted()
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
