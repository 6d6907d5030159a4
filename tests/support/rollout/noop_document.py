"""Serve config that deploys ``noop_applications``; imports no Ray."""

from __future__ import annotations

from typing import Any

from reelway.platform.rollout.traffic.routing import Routing

MODULE = "tests.support.rollout.noop_applications"
_CPUS = {"ray_actor_options": {"num_cpus": 0.01}, "max_ongoing_requests": 500}


def document(routing: Routing, port: int) -> dict[str, Any]:
    """Returns the Serve config that is deployed first."""

    def application(name: str, builder: str, prefix: str | None, deployment: str, **args: Any) -> dict[str, Any]:
        return {
            "name": name, "route_prefix": prefix, "import_path": f"{MODULE}:{builder}", "args": args,
            "deployments": [{"name": deployment, "num_replicas": 1, **_CPUS}],
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
        }  # fmt: skip

    router = application("router", "router", "/", "Router")
    router["deployments"][0]["user_config"] = routing.model_dump(mode="json")
    releases = [application(name, "release", None, "Release", release=name) for name in routing.releases]
    applications = [*releases, application("outcomes", "outcomes", "/v1/outcomes", "Outcomes"), router]
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}
