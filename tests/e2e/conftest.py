"""The harness of `make e2e`: an installation on a real cluster, traffic from a pod, an account when something fails.

Scenes are modules ``test_e2e_<number>_<what>.py``, run in the order of their numbers. Those that take ``flow`` share
one installation in KubeRay mode, under constant load from its first second; when one fails, the rest are skipped. Other
modules make installations of their own, before the flow or after it.

=====================  =============================================================================================
``cluster``            fixture: ``clusters.Cluster``: kubectl, helm, ``namespace(prefix)`` (restricted, deleted after)
``flow``               fixture: ``Flow``: the shared ``installation``, ``load``, ``releases``; ``note(...)`` a number
``Installation``       installation.py: install, upgrade, roll_back, uninstall, test; pods, head, until_ready; webhook
``release_fixtures``      made_releases.py: signed releases; ``deliver(kubectl)`` puts them into the claim ``releases``
``constant_load``      load_pod.py: ``Load``: rows, failed, answers, until_answered_by, alert; all in the pod's clock
``pod``                pods.py: a restricted pod of the operator's image with files and a claim
``begin, until_phase`` rollouts.py: ReleaseRollouts
``until``              waiting.py: a condition, a deadline, and what was seen instead
``account``            diagnosis.py: events, pods, logs, RayService; printed for every live namespace on a failure
=====================  =============================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.bench_results import write_report
from tests.support.e2e.clusters import Cluster, chosen
from tests.support.e2e.diagnosis import account
from tests.support.e2e.flow import Flow
from tests.support.e2e.installation import Installation
from tests.support.e2e.load_pod import constant_load
from tests.support.e2e.pods import image
from tests.support.e2e.release_fixtures import made_releases

_CLUSTER = pytest.StashKey[Cluster]()
_BROKEN = pytest.StashKey[str]()
NAMESPACE = "reelway-e2e"


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    found = chosen()
    if found is None:
        pytest.skip("no cluster: bring one up with `make cluster`, or set KUBECONFIG and REELWAY_CLUSTER_TESTS=1")
    found.kubectl("default").run("get", "--raw", "/readyz", "--request-timeout=10s")
    if found.own:
        _has_images(found)
    request.session.stash[_CLUSTER] = found
    yield found
    found.until_left()


def _has_images(cluster: Cluster) -> None:
    """On the node of `make cluster` nothing is pulled."""
    nodes = json.loads(cluster.kubectl("default").run("get", "nodes", "-o", "json"))["items"]
    known = {name for node in nodes for one in node["status"]["images"] for name in one["names"] or ()}
    wanted = {image("operator"), image("serving")}
    assert wanted <= known, f"the node lacks {sorted(wanted - known)}: build and load them (infra/images/README.md)"


@pytest.fixture(scope="session")
def _shared(cluster: Cluster) -> Iterator[Flow]:
    with made_releases(cluster, 5) as releases, cluster.namespace(NAMESPACE) as kubectl:
        releases.deliver(kubectl)
        installation = Installation(cluster, kubectl, releases)
        with constant_load(kubectl, installation.url) as load:
            flow = Flow(installation, load, releases)
            try:
                yield flow
            finally:
                installation.uninstall()
                write_report("e2e", flow.rows)


@pytest.fixture
def flow(_shared: Flow, request: pytest.FixtureRequest) -> Flow:
    if broken := request.session.stash.get(_BROKEN, ""):
        pytest.skip(f"{broken} failed, and this goes on where it ended")
    return _shared


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Scenes with an installation of their own do not come between those that share one: two would share the node."""
    of_flow = {item.path for item in items if "flow" in getattr(item, "fixturenames", ())}
    first = min((path.name for path in of_flow), default="")

    def place(item: pytest.Item) -> int:
        return 1 if item.path in of_flow else 0 if item.path.name < first else 2

    here = [item for item in items if item.path.parent == Path(__file__).parent]
    kept = iter(sorted(here, key=place))
    items[:] = [next(kept) if item.path.parent == Path(__file__).parent else item for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and item.get_closest_marker("e2e"):
        if "flow" in getattr(item, "fixturenames", ()) and call.when != "teardown":
            item.session.stash[_BROKEN] = item.name
        known = item.session.stash.get(_CLUSTER, None)
        for kubectl in known.live if known else ():
            report.sections.append((f"namespace {kubectl.namespace}", account(kubectl)))
    return report
