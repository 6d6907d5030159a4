"""Replicas of an operator that share a Lease, one rollout and one Serve, each with its own way to the API server.

The parts are the real ones, from the Lease to the controller and both traffic backends; time is virtual, and a call of
the test takes the place of each thread. The API server and Serve are the in-process doubles, called without a socket.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx
import yaml
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.cluster.fake_serve import BAD, STABLE, FakeServe, document
from tests.support.cluster.rollout_manifests import rollout
from tests.support.rollout.canary_events import POLICY
from tests.support.rollout.controller_environment import Clock, ScriptedEvidence

from reelway.platform.cluster import kube_api
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.kube_rollout_store import KubeRolloutStore
from reelway.platform.cluster.leader_election import LeaderElector
from reelway.platform.cluster.ray_service import RayServiceBackend
from reelway.platform.cluster.rollout_cache import PATH, InformerCache
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import KubernetesError, ReelwayError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.policy import parse_policy
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import find_routing
from reelway.platform.rollout.traffic.serve_rest import ServeAddress, ServeRestBackend
from reelway.platform.rollout.transition import start_state

RAY_SERVICE = "/apis/ray.io/v1/namespaces/test/rayservices/reelway"
LEASE_S = 10.0
_POLICY = parse_policy(POLICY, source="cut off")
_BACKEND = "rayservice/reelway"
_URL = "http://serve.test"


class ApiClient(KubeApi):
    """A client that calls the double directly. ``loses_answers``: the server writes, and the answer is lost."""

    def __init__(self, server: FakeApiServer) -> None:
        self.namespace, self.server = "test", server.url
        self._double = server
        self.reachable, self.loses_answers = True, False

    def _send(self, method: Any, path: str, body: Mapping[str, Any] | None = None, **_: Any) -> str:
        if not self.reachable:
            raise KubernetesError(f"{method} {path}: cannot reach {self.server}")
        sent = json.loads(json.dumps(body or {}))
        status, answer = self._double.answer(method, kube_api._url(path, "test"), sent)
        if self.loses_answers and method != "GET":
            raise KubernetesError(f"{method} {path}: timed out")
        if status >= 300:
            raise kube_api._error_from_response(f"{method} {path}", status, json.dumps(answer))
        return json.dumps(answer)


class Site:
    """The rollout, its RayService and its Serve."""

    def __init__(self) -> None:
        self.server, self.serve, self.clock = FakeApiServer(), FakeServe(), Clock()
        declared = yaml.safe_dump(document(Routing.single_release(STABLE)))
        self.server.put(RAY_SERVICE, {"metadata": {"name": "reelway"}, "spec": {"serveConfigV2": declared}})
        self.server.apply(rollout("one", BAD))
        admin = ApiClient(self.server)
        cache = InformerCache()
        cache.replace(admin.list(PATH))
        store, [resource] = KubeRolloutStore(admin, cache), cache.all()
        self.rollout_id = resource.rollout_id
        state = start_state(
            _POLICY, rollout_id=self.rollout_id, canary_release=BAD, stable_release=STABLE, now=self.clock.now
        )
        store.begin(resource, state, _POLICY)
        self._admin, self._cache, self.store = admin, cache, store

    def close(self) -> None:
        self.server.close()
        self.serve.close()

    @property
    def canary_bp(self) -> int:
        return self.serve.routing.weight_of(Arm.CANARY)

    @property
    def phase(self) -> str:
        self._cache.replace(self._admin.list(PATH))
        return self.store.get(self.rollout_id).state.phase.value

    @property
    def actions(self) -> list[str]:
        self._cache.replace(self._admin.list(PATH))
        return [entry.action for entry in self.store.history(self.rollout_id)]

    @property
    def declared(self) -> Routing:
        return Routing.model_validate(
            find_routing(yaml.safe_load(self.server.other[RAY_SERVICE]["spec"]["serveConfigV2"]))
        )


class Replica:
    """One process of the operator. ``before_write`` is called with each configuration that it sends to Serve."""

    def __init__(self, site: Site, name: str, before_write: Callable[[Replica, Routing], None]) -> None:
        self.site, self.name = site, name
        self._before_write = before_write
        self.api = ApiClient(site.server)
        self.lease = LeaderElector(self.api, "operator", name, duration_s=LEASE_S, clock=site.clock)
        self.evidence = ScriptedEvidence("few")
        self.active = False

    def renew(self) -> None:
        """One attempt of the Lease's thread. A replica that has lost the Lease ends; it starts anew."""
        try:
            held = self.lease.try_acquire_or_renew()
        except KubernetesError:
            return
        if held and not self.active:
            self._begin()
        elif not held and self.active:
            self.active = False
            self.lease = LeaderElector(self.api, "operator", self.name, duration_s=LEASE_S, clock=self.site.clock)

    def is_valid(self) -> bool:
        try:
            self.lease.require_valid()
        except ReelwayError:
            return False
        return self.active

    def watch(self) -> None:
        """Receives the changes of the rollouts."""
        if self.active and self.api.reachable:
            self.cache.replace(self.api.list(PATH))

    def reconcile(self) -> None:
        if self.active:
            with suppress(ReelwayError):  # the loop counts it and goes on
                self.controller.reconcile()

    def alert(self) -> None:
        """Receives an alert about the release, and reacts."""
        if not self.active:
            return
        labels = (("alertname", "CanaryErrors"), ("release", BAD))
        alert = KnownAlert(group_key="g", labels=labels, starts_at=self.site.clock.now, resolved=False)
        for call in (lambda: self.alerts.deliver([alert]), self.controller.react):
            with suppress(ReelwayError):
                call()

    def _begin(self) -> None:
        try:
            documents = self.api.list(PATH)
        except KubernetesError:
            return
        self.cache = InformerCache()
        self.cache.replace(documents)
        store = KubeRolloutStore(
            self.api, self.cache, backend=_BACKEND, require_lease=self.lease.require_valid, clock=self.site.clock
        )
        rest = ServeRestBackend(
            ServeAddress(_URL, _URL),
            before_write=self.lease.require_valid,
            before_rollback=self.lease.require_last_holder,
        )
        rest.close()
        rest._http = httpx.Client(transport=httpx.MockTransport(self._answer))
        backend = RayServiceBackend(self.api, "reelway", rest, before_write=self.lease.require_valid)
        self.alerts = AlertRegistry(store)
        self.controller = Controller(store, backend, self.evidence, self.alerts, clock=self.site.clock)
        self.active = True

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            config = json.loads(request.content)
            self._before_write(self, Routing.model_validate(find_routing(config)))
            self.site.serve.take(config)
            return httpx.Response(200, json={})
        status, text = self.site.serve._page(request.url.path)
        return httpx.Response(status, text=text)
