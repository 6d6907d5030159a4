"""Updates of Serve's configuration change exactly the routing and the releases."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from tests.support.rollout.noop_document import document

from reelway.platform.errors import RolloutError
from reelway.platform.rollout.control.webhook import serve_in_thread
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import (
    config_from_details,
    find_routing,
    release_names,
    with_target,
)
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficTarget, traffic_target
from reelway.platform.run_directory import RunDirectory

CONFIG = document(Routing.single_release("old"), 8000) | {"target_capacity": 50.0}


def target(phase: Phase = Phase.STEPPING, **more: Any) -> TrafficTarget:
    return traffic_target(
        RolloutState(
            id="r", salt="s", stable_release="old", canary_release="new", phase=phase, started_at=0, changed_at=0,
            tick_at=0,
            **more,
        )
    )  # fmt: skip


def by_name(config: Any) -> dict[str, Any]:
    return {app["name"]: app for app in config["applications"]}


def test_new_release_copies_the_stable_application() -> None:
    changed = by_name(with_target(CONFIG, target(canary_bp=500)))
    old, new = changed["old"], changed["new"]
    assert (new["name"], new["args"]["release"]) == ("new", "new")
    new["name"] = new["args"]["release"] = "old"
    assert new == old == by_name(CONFIG)["old"]


def test_update_changes_only_the_routing_of_the_router() -> None:
    wanted = target(canary_bp=500)
    before = copy.deepcopy(CONFIG)
    changed = with_target(CONFIG, wanted)
    assert before == CONFIG  # not changed in place
    assert Routing.model_validate(find_routing(changed)) == wanted.routing
    assert release_names(changed) == ("new", "old")
    router, router_before = by_name(changed)["router"], by_name(CONFIG)["router"]
    assert router["deployments"][0].pop("user_config") != by_name(CONFIG)["router"]["deployments"][0]["user_config"]
    assert router == {**router_before, "deployments": [{**router["deployments"][0]}]}
    assert by_name(changed)["outcomes"] == by_name(CONFIG)["outcomes"]
    assert {k: v for k, v in changed.items() if k != "applications"} == {
        k: v for k, v in CONFIG.items() if k != "applications"
    }


def test_release_that_is_not_in_the_target_is_removed() -> None:
    both = with_target(CONFIG, target(canary_bp=500))
    assert release_names(with_target(both, target(Phase.ROLLED_BACK))) == ("old",)
    retired = with_target(both, target(Phase.PROMOTED, canary_bp=10_000, retired=True))
    assert release_names(retired) == ("new",)
    assert by_name(retired)["new"] == by_name(both)["new"]


def test_removed_stable_application_is_restored_from_the_canary() -> None:
    both = with_target(CONFIG, target(canary_bp=500))
    both["applications"] = [app for app in both["applications"] if app["name"] != "old"]
    assert by_name(with_target(both, target(canary_bp=500)))["old"] == by_name(CONFIG)["old"]


_points = st.integers(0, 10_000)


@given(first=_points, second=_points)
def test_result_depends_only_on_the_last_target(first: int, second: int) -> None:
    once = with_target(CONFIG, target(canary_bp=second))
    assert with_target(with_target(CONFIG, target(canary_bp=first)), target(canary_bp=second)) == once
    assert with_target(once, target(canary_bp=second)) == once


@pytest.mark.parametrize(
    ("applications", "message"),
    [
        ([], "no application 'router' among"),
        ([app for app in CONFIG["applications"] if app["name"] != "old"], "no application of a release to copy"),
        ([{"name": "router", "deployments": [{"name": "Router"}]}], "0 of its deployments .* have a user_config"),
    ],
)
def test_config_without_the_expected_applications_is_rejected(applications: list[Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        with_target({"applications": applications}, target())


def details(config: Any, status: str = "RUNNING") -> dict[str, Any]:
    """Returns the response of Serve's REST API when ``config`` is deployed."""
    applications = {
        name: {"status": status, "message": "", "deployed_app_config": app, "deployments": {}}
        for name, app in by_name(config).items()
    }
    return {**config, "applications": applications, "proxies": {}, "controller_info": {}, "grpc_options": None}


def test_config_is_read_from_the_response_of_serve() -> None:
    response = details(CONFIG)
    found = config_from_details(response)
    assert by_name(found) == by_name(CONFIG)
    assert {k: v for k, v in found.items() if k != "applications"} == {
        "http_options": CONFIG["http_options"],
        "target_capacity": 50.0,
    }
    response["applications"]["old-canary"] = {"status": "DELETING", "deployed_app_config": None}
    assert config_from_details(response) == found


def test_application_without_a_config_is_rejected() -> None:
    response = details(CONFIG)
    response["applications"]["imperative"] = {"status": "RUNNING", "deployed_app_config": None}
    with pytest.raises(RolloutError, match="'imperative': it was not deployed by configuration"):
        config_from_details(response)


# The backend with a fake Serve


class FakeServeApi:
    """A server with the endpoints of Serve and the router; tests change its responses."""

    def __init__(self) -> None:
        self.config: Any = dict(CONFIG)
        self.status = "RUNNING"
        self.error_response: Response | None = None
        self.applied_routing: Routing | None = None
        self.calls: list[str] = []
        self.token = ""

    def application(self) -> Starlette:
        async def applications(request: Request) -> Response:
            self.calls.append(request.method)
            if request.headers.get("authorization") != f"Bearer {self.token}":
                return PlainTextResponse("Unauthorized: Missing authentication token", 401)
            if self.error_response is not None:
                return self.error_response
            if request.method == "PUT":
                self.config = await request.json()
                return Response()
            return JSONResponse(details(self.config, self.status))

        async def current(_: Request) -> Response:
            routing = self.applied_routing or Routing.model_validate(find_routing(self.config))
            return JSONResponse({"routing": routing.model_dump(mode="json"), "open": ["old", "new"]})

        return Starlette(
            routes=[
                Route("/api/serve/applications/", applications, methods=["GET", "PUT"]),
                Route("/v1/releases/current", current),
            ]
        )


@pytest.fixture
def stub() -> FakeServeApi:
    return FakeServeApi()


@pytest.fixture
def backend(tmp_path: Path, stub: FakeServeApi) -> Any:
    run = RunDirectory(tmp_path)
    run.keys.mkdir()
    stub.token = "secret-of-ray"
    (run.keys / "ray.token").write_text(stub.token + "\n")
    with serve_in_thread(stub.application(), "127.0.0.1", 0) as url:
        (tmp_path / "serving.json").write_text(
            json.dumps({"internal_url": url, "serve_api": url, "pid": 1, "release": "old"})
        )
        rest_backend = ServeRestBackend(run, timeout_s=2)
        yield rest_backend
        rest_backend.close()


def test_rollback_is_one_request_after_an_observation(backend: ServeRestBackend, stub: FakeServeApi) -> None:
    backend.observe()
    stub.calls.clear()
    backend.apply(target(canary_bp=500))
    backend.apply(target(Phase.ROLLING_BACK))
    assert stub.calls == ["PUT", "PUT"]
    backend.apply(target(Phase.ROLLING_BACK))  # an unchanged config is not written
    assert stub.calls == ["PUT", "PUT"]
    assert backend.observe().routing == target(Phase.ROLLING_BACK).routing


def test_first_write_reads_the_config_before(backend: ServeRestBackend, stub: FakeServeApi) -> None:
    backend.apply(target(canary_bp=500))
    assert stub.calls == ["GET", "PUT"]
    assert by_name(stub.config)["outcomes"] == by_name(CONFIG)["outcomes"]


def test_rejected_write_reports_the_response_of_serve(backend: ServeRestBackend, stub: FakeServeApi) -> None:
    backend.observe()
    stub.error_response = PlainTextResponse("1 validation error: applications.0.name must be nonempty", 400)
    with pytest.raises(RolloutError, match=r"PUT .* answered 400: 1 validation error: applications\.0\.name"):
        backend.apply(target(canary_bp=500))
    stub.error_response = None
    stub.calls.clear()
    backend.apply(target(canary_bp=500))
    assert stub.calls == ["GET", "PUT"]


def test_error_names_a_wrong_token(backend: ServeRestBackend, stub: FakeServeApi, tmp_path: Path) -> None:
    (tmp_path / "keys" / "ray.token").write_text("another")
    assert "answered 401: Unauthorized" in backend.observe().detail
    assert "check that keys/ray.token is the service's token" in backend.observe().detail
    (tmp_path / "keys" / "ray.token").write_text(stub.token)
    assert backend.observe().releases == ("old",)


def test_stopped_service_is_unknown_until_it_runs_again(backend: ServeRestBackend, tmp_path: Path) -> None:
    record = tmp_path / "serving.json"
    content = record.read_text()
    record.write_text(json.dumps({"internal_url": "http://127.0.0.1:9", "serve_api": "http://127.0.0.1:9"}))
    observation = backend.observe()
    assert (observation.routing, observation.releases) == (None, ())
    assert "ConnectError" in observation.detail
    with pytest.raises(RolloutError, match="check that the service is running"):
        backend.apply(target())
    record.unlink()
    assert "start `reelway serve`" in backend.observe().detail
    record.write_text("{}")
    assert "not a valid serving record" in backend.observe().detail
    record.write_text(content)
    assert backend.observe().routing == Routing.single_release("old")


def test_hanging_service_is_unknown_after_the_timeout(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "serving.json").write_text(json.dumps({"internal_url": url, "serve_api": url}))
        backend = ServeRestBackend(RunDirectory(tmp_path), timeout_s=0.2)
        assert "ReadTimeout" in backend.observe().detail
        backend.close()


def test_routing_is_unknown_while_the_router_applies_another_one(backend: ServeRestBackend, stub: FakeServeApi) -> None:
    stub.config = with_target(CONFIG, target(canary_bp=500))
    stub.applied_routing = Routing.single_release("old")
    observation = backend.observe()
    assert (observation.routing, observation.ready) == (None, {"old", "new"})
    assert "has not applied its configured routing" in observation.detail
    stub.applied_routing = None
    assert backend.observe().routing == target(canary_bp=500).routing
    stub.status = "DEPLOYING"
    assert (backend.observe().routing, backend.observe().detail) == (None, "the router is DEPLOYING")
