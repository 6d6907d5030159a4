"""Which traffic a RayService keeps when its options change or its ``serveConfigV2`` is lost; no cluster is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.cluster.fake_serve import GOOD, STABLE, FakeServe, document

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.ray_service import OPTIONS_DIGEST, RayServiceBackend
from reelway.platform.cluster.serve_config_reconciler import DIGEST_TIMEOUT_S, ServeConfigReconciler, digest_of
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import find_routing, release_names
from reelway.platform.rollout.traffic.serve_rest import ServeAddress, ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficTarget, traffic_target

NOWHERE = "http://127.0.0.1:9"
RAY_SERVICE = "/apis/ray.io/v1/namespaces/test/rayservices/reelway"
OPTIONS = "/api/v1/namespaces/test/configmaps/reelway-serving"
ACTIVE = {"activeServiceStatus": {"rayClusterName": "reelway-abcde"}}
"""Status of a RayService after KubeRay has given its Services the first cluster."""


class RayServiceObjects:
    """The RayService and the options of one installation on a fake API server."""

    def __init__(self, server: FakeApiServer) -> None:
        self._server = server

    def apply(self, text: str, *, config: dict[str, Any] | None = None, status: dict[str, Any] | None = None) -> None:
        self.apply_options(text)
        spec = {"serveConfigV2": yaml.safe_dump(config)} if config else {}
        metadata = {"name": "reelway", "annotations": {OPTIONS_DIGEST: digest_of(text)}}
        self._server.put(RAY_SERVICE, {"metadata": metadata, "spec": spec, "status": status or {}})

    def apply_options(self, text: str) -> None:
        self._server.put(OPTIONS, {"metadata": {"name": "reelway-serving"}, "data": {"options.yaml": text}})

    @property
    def declared(self) -> dict[str, Any]:
        config = yaml.safe_load(self._server.other[RAY_SERVICE]["spec"].get("serveConfigV2", "{}"))
        assert isinstance(config, dict)
        return config

    @property
    def patches(self) -> int:
        return self._server.log.count(("PATCH", RAY_SERVICE))


def options(**changes: Any) -> str:
    values = {
        "releases": {"release_store": "/store", "release_cache": "/cache", "public_keys": "/keys"},
        "initial": {"release": STABLE, "salt": "s"},
        "metrics_dir": "/metrics",
        "outcomes": "/outcomes.db",
    }
    return yaml.safe_dump({**values, **changes})


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    fake = FakeApiServer()
    yield fake
    fake.close()


@pytest.fixture
def api(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubeApi:
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    return KubeApi()


@pytest.fixture
def objects(server: FakeApiServer) -> RayServiceObjects:
    return RayServiceObjects(server)


@pytest.fixture
def serve() -> Iterator[FakeServe]:
    fake = FakeServe()
    yield fake
    fake.close()


@pytest.fixture
def silent(api: KubeApi) -> Iterator[RayServiceBackend]:
    """A RayService whose Serve does not answer."""
    backend = RayServiceBackend(api, "reelway", ServeRestBackend(ServeAddress(NOWHERE, NOWHERE)))
    yield backend
    backend.close()


@pytest.fixture
def running(api: KubeApi, serve: FakeServe) -> Iterator[RayServiceBackend]:
    """A RayService whose Serve answers."""
    backend = RayServiceBackend(api, "reelway", ServeRestBackend(ServeAddress(serve.url, serve.url)))
    yield backend
    backend.close()


def stepping(canary_bp: int = 5000) -> TrafficTarget:
    return traffic_target(
        RolloutState(
            id="r-1", salt="s", stable_release=STABLE, canary_release=GOOD, phase=Phase.STEPPING, canary_bp=canary_bp,
            started_at=0, changed_at=0, tick_at=0,
        )
    )  # fmt: skip


def test_service_that_never_had_traffic_gets_the_initial_release(
    api: KubeApi, objects: RayServiceObjects, silent: RayServiceBackend
) -> None:
    objects.apply(options())
    assert ServeConfigReconciler(api, silent).reconcile()
    assert Routing.model_validate(find_routing(objects.declared)) == Routing.single_release(STABLE, salt="s")


def test_lost_config_waits_while_serve_is_silent(
    api: KubeApi, objects: RayServiceObjects, silent: RayServiceBackend
) -> None:
    """Another release than the initial one may have all viewers."""
    objects.apply(options(), status=ACTIVE)
    for _ in range(3):
        with pytest.raises(RolloutError, match=r"serveConfigV2 is lost and Serve does not state the traffic: GET "):
            ServeConfigReconciler(api, silent).reconcile()
    assert objects.declared == {}


def test_lost_config_waits_while_serve_runs_no_router(
    api: KubeApi, objects: RayServiceObjects, running: RayServiceBackend, serve: FakeServe
) -> None:
    serve.document = {**serve.document, "applications": []}
    objects.apply(options(), status=ACTIVE)
    with pytest.raises(RolloutError, match="serveConfigV2 is lost"):
        ServeConfigReconciler(api, running).reconcile()
    assert objects.declared == {}


def test_lost_config_is_restored_when_serve_answers_again(
    api: KubeApi, objects: RayServiceObjects, running: RayServiceBackend, serve: FakeServe
) -> None:
    promoted = Routing.single_release(GOOD, salt="r-1")
    serve.document = document(promoted)
    objects.apply(options(), status=ACTIVE)
    assert ServeConfigReconciler(api, running).reconcile()
    assert Routing.model_validate(find_routing(objects.declared)) == promoted


def test_lost_config_gets_the_recorded_target(
    api: KubeApi, objects: RayServiceObjects, silent: RayServiceBackend
) -> None:
    objects.apply(options(), status=ACTIVE)
    assert ServeConfigReconciler(api, silent, recorded_target=stepping).reconcile()
    assert release_names(objects.declared) == (STABLE, GOOD)
    assert Routing.model_validate(find_routing(objects.declared)) == stepping().routing


def test_options_wait_until_the_recorded_target_is_declared(
    api: KubeApi, objects: RayServiceObjects, running: RayServiceBackend
) -> None:
    """A rollout has recorded 50 %, and its controller has not written it yet: new options must not write 10 % again."""
    before = document(stepping(1000).routing)
    objects.apply(options(port=9000), config=before, status=ACTIVE)
    reconciler = ServeConfigReconciler(api, running, recorded_target=stepping)
    assert not reconciler.reconcile()
    assert objects.declared == before
    running.observe()
    running.apply(stepping())
    assert reconciler.reconcile()
    assert objects.declared["http_options"]["port"] == 9000
    assert Routing.model_validate(find_routing(objects.declared)) == stepping().routing


def test_options_of_another_digest_are_an_error_after_a_minute(
    api: KubeApi, objects: RayServiceObjects, silent: RayServiceBackend
) -> None:
    now = [0.0]
    reconciler = ServeConfigReconciler(api, silent, clock=lambda: now[0])
    objects.apply(options())
    reconciler.reconcile()
    objects.apply_options(options(port=9000))
    for now[0] in (0.0, DIGEST_TIMEOUT_S):
        assert not reconciler.reconcile()
    now[0] = DIGEST_TIMEOUT_S + 1
    with pytest.raises(
        RolloutError, match="not the options that RayService reelway was rendered with; apply the chart"
    ):
        reconciler.reconcile()
    assert objects.declared["http_options"]["port"] == 8000
    objects.apply(options(), config=objects.declared)  # the digests agree again, so the minute begins anew
    assert not reconciler.reconcile()
    objects.apply_options(options(port=9000))
    assert not reconciler.reconcile()


def test_older_read_does_not_replace_a_newer_write(
    api: KubeApi, objects: RayServiceObjects, running: RayServiceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread reads the RayService, another thread writes it, and the first one continues with what it read."""
    objects.apply(options(), config=document(Routing.single_release(STABLE)), status=ACTIVE)
    read = api.get

    def read_slowly(path: str) -> dict[str, Any] | None:
        outdated = read(path)
        monkeypatch.setattr(api, "get", read)
        running.apply(stepping())
        return outdated

    monkeypatch.setattr(api, "get", read_slowly)
    seen = running.fetch()
    assert Routing.model_validate(find_routing(seen.config)) == stepping().routing
    before = objects.patches
    running.apply(stepping(0))  # based on the newest version, so that no write is rejected
    assert objects.patches == before + 1
