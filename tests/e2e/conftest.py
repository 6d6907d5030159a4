"""Fixtures of `make e2e`: an installation on a real cluster, traffic from a pod, and a report on each failure.

The modules ``test_e2e_<number>_<subject>.py`` run in the order of their numbers. Tests that take the fixture ``shared``
use one installation in KubeRay mode, under constant load from its start; if one of them fails, the rest are skipped.
Other modules create their own installations, before or after the shared one.

============================  ======================================================================================
``cluster``                   fixture, ``clusters.Cluster``: kubectl, helm, ``namespace(prefix)`` (restricted)
``shared``                    fixture, ``SharedInstallation``: ``installation``, ``load``, ``releases``, ``note(...)``
``Installation``              installation.py: install, upgrade, roll_back, uninstall, test, pods, head, webhook
``build_release_fixtures``    release_fixtures.py: signed releases; ``deliver(kubectl)`` copies them into a claim
``constant_load``             load_pod.py, ``Load``: rows, failed, answers, alert; all times are from the pod's clock
``pod``                       pods.py: a restricted pod of the operator's image with files and a claim
``begin, wait_until_phase``   rollouts.py: ReleaseRollouts
``until``                     wait_until.py: waits for a condition with a deadline
``describe_namespace``        diagnosis.py: events, pods, logs and RayService; printed on failure
============================  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.bench_results import write_report
from tests.support.e2e.clusters import Cluster, find_cluster
from tests.support.e2e.diagnosis import describe_namespace
from tests.support.e2e.installation import Installation
from tests.support.e2e.load_pod import constant_load
from tests.support.e2e.pods import check_images, image
from tests.support.e2e.release_fixtures import build_release_fixtures
from tests.support.e2e.shared_installation import SharedInstallation

_CLUSTER = pytest.StashKey[Cluster]()
_FAILED = pytest.StashKey[str]()
NAMESPACE = "reelway-e2e"


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster = find_cluster()
    if cluster is None:
        pytest.skip("no cluster: start one with `make cluster`, or set KUBECONFIG and REELWAY_CLUSTER_TESTS=1")
    cluster.kubectl("default").run("get", "--raw", "/readyz", "--request-timeout=10s")
    if cluster.own:
        check_images(cluster, {image("operator"), image("serving")})
    request.session.stash[_CLUSTER] = cluster
    yield cluster
    cluster.wait_until_deleted()


@pytest.fixture(scope="session")
def _session_installation(cluster: Cluster) -> Iterator[SharedInstallation]:
    with build_release_fixtures(cluster, 5) as releases, cluster.namespace(NAMESPACE) as kubectl:
        releases.deliver(kubectl)
        installation = Installation(cluster, kubectl, releases)
        with constant_load(kubectl, installation.url) as load:
            shared = SharedInstallation(installation, load, releases)
            try:
                yield shared
            finally:
                installation.uninstall()
                write_report("e2e", shared.rows)


@pytest.fixture
def shared(_session_installation: SharedInstallation, request: pytest.FixtureRequest) -> SharedInstallation:
    if failed := request.session.stash.get(_FAILED, ""):
        pytest.skip(f"{failed} failed, and this test continues from its end state")
    return _session_installation


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs modules with their own installations before or after the shared one, so that only one exists at a time."""
    of_shared = {item.path for item in items if "shared" in getattr(item, "fixturenames", ())}
    first = min((path.name for path in of_shared), default="")

    def group(item: pytest.Item) -> int:
        return 1 if item.path in of_shared else 0 if item.path.name < first else 2

    e2e_items = [item for item in items if item.path.parent == Path(__file__).parent]
    in_order = iter(sorted(e2e_items, key=group))
    items[:] = [next(in_order) if item.path.parent == Path(__file__).parent else item for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and item.get_closest_marker("e2e"):
        if "shared" in getattr(item, "fixturenames", ()) and call.when != "teardown":
            item.session.stash[_FAILED] = item.name
        cluster = item.session.stash.get(_CLUSTER, None)
        for kubectl in cluster.live if cluster else ():
            report.sections.append((f"namespace {kubectl.namespace}", describe_namespace(kubectl)))
    return report
