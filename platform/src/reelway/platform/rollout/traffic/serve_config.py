"""Why: the traffic of a rollout is a change to Serve's own configuration document; this is that change, and no more.

Pure functions on the document that ``PUT /api/serve/applications/`` and a RayService's ``serveConfigV2`` both take.
What runs is the template: a new release's application is one that runs with another name, so nothing here knows of
replicas, resources or settings. Applications that are no release's and all options stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.traffic.target import TrafficTarget

ROUTER: Final = "router"
"""Name of the application whose ``user_config`` is the routing."""
_KEPT: Final = ("proxy_location", "http_options", "grpc_options", "target_capacity")

ServeConfig = Mapping[str, Any]


def config_of(details: Mapping[str, Any]) -> dict[str, Any]:
    """The document behind ``GET /api/serve/applications/``: what was deployed, and the instance's options.

    Raises:
        RolloutError: an application was not deployed by configuration, so that writing the document would end it.
    """
    applications = []
    for name, application in sorted(details.get("applications", {}).items()):
        if application.get("status") == "DELETING":
            continue
        deployed = application.get("deployed_app_config")
        if deployed is None:
            raise RolloutError(
                f"Serve's application {name!r} was not deployed by configuration; restart it with `reelway serve`"
            )
        applications.append(deployed)
    kept = {key: details[key] for key in _KEPT if details.get(key) is not None}
    return {**kept, "applications": applications}


def with_target(config: ServeConfig, target: TrafficTarget) -> dict[str, Any]:
    """The document that makes ``target`` so: the routing, and an application for each of its releases and no others.

    Applied twice it is the same; ``config`` is not changed.

    Raises:
        RolloutError: there is no router, or no application of a release to make another one like.
    """
    applications = copy.deepcopy(list(config.get("applications", ())))
    running = {app["name"]: app for app in applications if is_release(app)}
    others = [app for app in applications if app["name"] not in running]
    _router_options(others)["user_config"] = target.routing.model_dump(mode="json")
    releases = [running.get(release) or _like(_template(running, target), release) for release in target.releases]
    return {**copy.deepcopy(dict(config)), "applications": [*releases, *others]}


def routing_in(config: ServeConfig) -> Any:
    """The routing that the router was told, as it stands in the document; None without one."""
    try:
        return _router_options(config.get("applications", ())).get("user_config")
    except RolloutError:
        return None


def releases_in(config: ServeConfig) -> tuple[str, ...]:
    """The releases that have an application."""
    return tuple(sorted(app["name"] for app in config.get("applications", ()) if is_release(app)))


def is_release(application: Mapping[str, Any]) -> bool:
    """Whether an application is a release's: it is named by the release that it was given."""
    return bool(application.get("args", {}).get("release") == application.get("name"))


def _router_options(applications: Any) -> dict[str, Any]:
    """The router deployment's entry."""
    router = next((app for app in applications if app.get("name") == ROUTER), None)
    if router is None:
        names = [app.get("name") for app in applications]
        raise RolloutError(f"Serve runs the applications {names}, none of them {ROUTER!r}; start `reelway serve`")
    deployments: list[dict[str, Any]] = router.get("deployments", [])
    told = [deployment for deployment in deployments if "user_config" in deployment]
    if len(told) != 1:
        names = [deployment.get("name") for deployment in deployments]
        raise RolloutError(
            f"application {ROUTER!r} lists the deployments {names}, {len(told)} of them with a user_config, expected "
            "one; was it deployed by `reelway serve`?"
        )
    return told[0]


def _template(running: Mapping[str, dict[str, Any]], target: TrafficTarget) -> dict[str, Any]:
    """The application that a new one is to be like: stable's, or any release's if somebody removed that one."""
    stable = [route.release for route in target.routing.arms if route.arm is Arm.STABLE]
    for name in (*stable, *target.releases, *sorted(running)):
        if name in running:
            return running[name]
    raise RolloutError("no application of a release runs, so there is none to make another one like; restart serving")


def _like(template: Mapping[str, Any], release: str) -> dict[str, Any]:
    made = copy.deepcopy(dict(template))
    made["name"] = release
    made["args"]["release"] = release
    return made
