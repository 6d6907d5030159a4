"""Composes and updates Ray Serve's configuration (``PUT /api/serve/applications/``, ``serveConfigV2`` of a RayService).

A release is one entry of ``applications``: ``name`` and ``args["release"]`` are the release's id, and nothing else in
the entry differs between releases. The routing is the ``user_config`` of the deployment ``Router``. Both are the only
parts that a rollout changes. All functions are pure.

``compose_serve_config`` builds the configuration from options. It runs in `reelway serve` on one machine and in
`reelway operator` on a cluster, so both get the same configuration for the same options. ``with_target`` changes the
releases and the routing of a configuration that exists and needs no options for that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serving_options import (
    DeploymentOptions,
    OutcomesArgs,
    ReleaseArgs,
    RouterArgs,
    ServingOptions,
)
from reelway.platform.rollout.traffic.target import TrafficTarget

ROUTER: Final = "router"
"""Name of the application whose ``user_config`` is the routing."""
OUTCOMES: Final = "outcomes"
_BUILDERS: Final = "reelway.serving.deployments.applications"
RELEASE_BUILDER: Final = f"{_BUILDERS}:release"
ROUTER_BUILDER: Final = f"{_BUILDERS}:router"
OUTCOMES_BUILDER: Final = f"{_BUILDERS}:outcomes"
_OUTCOMES_PREFIX: Final = "/v1/outcomes/metrics"
"""The sums. ``POST /v1/outcomes`` is a route of the router, which has all other paths."""
_LOGGING_CONFIG: Final = {"log_level": "WARNING", "enable_access_log": False}
"""One log line per request and hop costs more CPU than the hop itself; metrics count every request."""
_INSTANCE_OPTIONS: Final = ("proxy_location", "http_options", "grpc_options", "target_capacity")

ServeConfig = Mapping[str, Any]


def compose_serve_config(options: ServingOptions, releases: Iterable[str], routing: Routing) -> dict[str, Any]:
    """Returns the configuration of a service: one application per release, the outcomes and the router.

    Whole numbers are integers, also where an option is a float. KubeRay converts the configuration to JSON in Go, which
    writes 250.0 as 250. Ray Serve compares the arguments as text, so a float would be another version of the code: it
    would build the application anew at every weight, which takes seconds.
    """
    applications = [_release_application(options, release) for release in releases]
    if options.outcomes:
        applications.append(_outcomes_application(options, options.outcomes))
    applications.append(_router_application(options, routing))
    config = {
        "proxy_location": options.proxy_location,
        "http_options": {"host": options.host, "port": options.port},
        "logging_config": dict(_LOGGING_CONFIG),
        "applications": applications,
    }
    return cast(dict[str, Any], _with_whole_numbers(config))


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_whole_numbers(item) for item in value]
    return value


def _release_application(options: ServingOptions, release: str) -> dict[str, Any]:
    args = ReleaseArgs(
        **options.releases.model_dump(),
        release=release,
        composition=options.composition,
        ranker_address=options.ranker_address,
        events=options.events,
    )
    stages = options.deployments
    deployments = [
        _deployment("Retrieval", stages.retrieval),
        _deployment("Ranking", stages.ranking),
        _deployment("Reranking", stages.reranking),
    ]
    if options.composition == "fused":
        deployments = [_deployment("Release", DeploymentOptions(num_cpus=stages.router.num_cpus))]
    return {
        "name": release,
        "route_prefix": None,  # reached through the router only
        "import_path": RELEASE_BUILDER,
        "args": args.model_dump(mode="json"),
        "deployments": deployments,
        **_process_options(options),
    }


def _outcomes_application(options: ServingOptions, state: Path) -> dict[str, Any]:
    args = OutcomesArgs(
        token_secrets=options.token_secrets,
        state=state,
        events=options.events or str(state.parent / "events"),
        require_authenticated=options.access.on,
    )
    return {
        "name": OUTCOMES,
        "route_prefix": _OUTCOMES_PREFIX,
        "import_path": OUTCOMES_BUILDER,
        "args": args.model_dump(mode="json"),
        "deployments": [_deployment("Outcomes", options.deployments.outcomes)],
        **_process_options(options),
    }


def _router_application(options: ServingOptions, routing: Routing) -> dict[str, Any]:
    args = RouterArgs(
        **options.releases.model_dump(),
        token_secrets=options.token_secrets,
        features_dir=options.features_dir,
        vector_log=options.vector_log,
        parity_ratio=options.parity_ratio,
        budgets=options.budgets,
        composition=options.composition,
        max_ongoing_requests=options.max_ongoing_requests,
        max_ongoing_sustained=options.max_ongoing_sustained,
        events=options.events,
        log_keeper=OUTCOMES if options.outcomes and not options.events else None,
        access=options.access,
    )
    router = _deployment("Router", options.deployments.router)
    return {
        "name": ROUTER,
        "route_prefix": "/",
        "import_path": ROUTER_BUILDER,
        "args": args.model_dump(mode="json"),
        "deployments": [router | {"user_config": routing.model_dump(mode="json")}],
        **_process_options(options),
    }


def _deployment(name: str, options: DeploymentOptions) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": options.num_cpus}
    if options.num_gpus:
        actor["num_gpus"] = options.num_gpus
    if options.memory_bytes:
        actor["memory"] = options.memory_bytes
    if options.resources:
        actor["resources"] = options.resources
    replicas: dict[str, Any] = {"num_replicas": options.num_replicas}
    if options.autoscaling:
        replicas = {"num_replicas": "auto", "autoscaling_config": options.autoscaling.model_dump(mode="json")}
    return {"name": name, **replicas, "ray_actor_options": actor}


def _process_options(options: ServingOptions) -> dict[str, Any]:
    environment = {**options.environment, "PROMETHEUS_MULTIPROC_DIR": str(options.metrics_dir)}
    return {"runtime_env": {"env_vars": environment}, "logging_config": dict(_LOGGING_CONFIG)}


def config_from_details(details: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration in a response of ``GET /api/serve/applications/``: applications and instance options.

    Raises:
        RolloutError: if an application was not deployed by configuration; writing the configuration would delete it.
    """
    applications = []
    for name, application in sorted(details.get("applications", {}).items()):
        if application.get("status") == "DELETING":
            continue
        deployed = application.get("deployed_app_config")
        if deployed is None:
            raise RolloutError(
                f"Serve application {name!r}: it was not deployed by configuration; restart it with `reelway serve`"
            )
        applications.append(deployed)
    instance_options = {key: details[key] for key in _INSTANCE_OPTIONS if details.get(key) is not None}
    return {**instance_options, "applications": applications}


def with_target(config: ServeConfig, target: TrafficTarget) -> dict[str, Any]:
    """Returns a copy of the configuration with the target's routing and one application for each of its releases.

    An application for a new release is a copy of the stable release's. Applications of other releases are removed;
    applications that belong to no release stay. The function is idempotent.

    Raises:
        RolloutError: if there is no router, or no application of a release to copy.
    """
    applications = copy.deepcopy(list(config.get("applications", ())))
    running = {app["name"]: app for app in applications if is_release(app)}
    others = [app for app in applications if app["name"] not in running]
    _router_options(others)["user_config"] = target.routing.model_dump(mode="json")
    releases = [
        running.get(release) or _clone_application(_template(running, target), release) for release in target.releases
    ]
    return {**copy.deepcopy(dict(config)), "applications": [*releases, *others]}


def find_routing(config: ServeConfig) -> Any:
    """Returns the router's ``user_config``; None without a router."""
    try:
        return _router_options(config.get("applications", ())).get("user_config")
    except RolloutError:
        return None


def release_names(config: ServeConfig) -> tuple[str, ...]:
    """Returns the ids of the releases that have an application, sorted."""
    return tuple(sorted(app["name"] for app in config.get("applications", ()) if is_release(app)))


def is_release(application: Mapping[str, Any]) -> bool:
    """Returns whether an application serves a release: its name is the release that it was given as an argument."""
    return bool(application.get("args", {}).get("release") == application.get("name"))


def _router_options(applications: Any) -> dict[str, Any]:
    """Returns the entry of the router's deployment."""
    router = next((app for app in applications if app.get("name") == ROUTER), None)
    if router is None:
        names = [app.get("name") for app in applications]
        raise RolloutError(f"Serve: no application {ROUTER!r} among {names}; start `reelway serve`")
    deployments: list[dict[str, Any]] = router.get("deployments", [])
    routed = [deployment for deployment in deployments if "user_config" in deployment]
    if len(routed) != 1:
        names = [deployment.get("name") for deployment in deployments]
        raise RolloutError(
            f"Serve application {ROUTER!r}: {len(routed)} of its deployments {names} have a user_config, expected 1; "
            "restart it with `reelway serve`"
        )
    return routed[0]


def _template(running: Mapping[str, dict[str, Any]], target: TrafficTarget) -> dict[str, Any]:
    """Returns the application to copy for a new release: stable's, or that of any release if stable's was removed."""
    stable = [route.release for route in target.routing.arms if route.arm is Arm.STABLE]
    for name in (*stable, *target.releases, *sorted(running)):
        if name in running:
            return running[name]
    raise RolloutError("Serve: no application of a release to copy for a new one; restart the service")


def _clone_application(template: Mapping[str, Any], release: str) -> dict[str, Any]:
    application = copy.deepcopy(dict(template))
    application["name"] = release
    application["args"]["release"] = release
    return application
