"""What the chart tells Serve, Feast and the operator is what these read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from tests.charts.chart_tool import CHART, RELEASE, Document, named, program, rendered

from reelway.platform.cli.main import build_app
from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.rules import canary_rules
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.rollout.traffic.serve_config import with_target
from reelway.platform.rollout.traffic.target import TrafficTarget
from reelway.serving.serve_config import (
    OutcomesArgs,
    ReleaseShelf,
    ReleaseSource,
    RouterArgs,
    ServiceOptions,
    serve_config,
)
from reelway.serving.serve_settings import SERVE_SETTINGS


def document(environment: str, component: str) -> Document:
    objects = rendered(environment, component)
    if component == "static":
        text = named(objects, "ConfigMap", "-serve-document")["data"]["serve.json"]
        return dict(json.loads(text))
    return dict(yaml.safe_load(named(objects, "RayService")["spec"]["serveConfigV2"]))


def head_of(environment: str, component: str) -> dict[str, Any]:
    """The specification of the pod that is Ray's head."""
    kind = "StatefulSet" if component == "static" else "RayService"
    spec = next(one for one in rendered(environment, component) if one["kind"] == kind)["spec"]
    template = spec["template"] if component == "static" else spec["rayClusterConfig"]["headGroupSpec"]["template"]
    found: dict[str, Any] = template["spec"]
    return found


def ray_environment(component: str, environment: str = "dev") -> dict[str, str | None]:
    """Of the first container of Ray's head."""
    return {one["name"]: one.get("value") for one in head_of(environment, component)["containers"][0]["env"]}


@pytest.mark.parametrize("component", ["kuberay", "static"])
@pytest.mark.parametrize("environment", ["dev", "production-cpu"])
def test_the_document_has_what_the_builders_take(environment: str, component: str) -> None:
    applications = {one["name"]: one for one in document(environment, component)["applications"]}
    assert set(applications) == {RELEASE, "outcomes", "router"}
    assert ReleaseSource(**applications[RELEASE]["args"]).release == RELEASE
    assert RouterArgs(**applications["router"]["args"]).outcomes == "outcomes"
    OutcomesArgs(**applications["outcomes"]["args"])
    (router,) = applications["router"]["deployments"]
    assert Routing.model_validate(router["user_config"]) == Routing.whole(RELEASE)


def test_the_document_is_the_laptops_but_for_places_and_sizes() -> None:
    shelf = ReleaseShelf(release_store="x", release_cache=Path("x"), public_keys=Path("x"))
    laptop = serve_config(
        Routing.whole(RELEASE), ServiceOptions(shelf=shelf, metrics_dir=Path("x"), outcomes=Path("x"))
    )
    chart = document("dev", "static")
    assert [shape(one) for one in chart["applications"]] == [shape(one) for one in laptop["applications"]]


def shape(application: Document) -> dict[str, Any]:
    return {
        **{key: application[key] for key in ("name", "route_prefix", "import_path", "logging_config")},
        "args": sorted(application["args"]),
        "environment": sorted(application["runtime_env"]["env_vars"]),
        "deployments": [(one["name"], one.get("user_config")) for one in application["deployments"]],
    }


def test_a_rollout_can_write_its_traffic_into_the_document() -> None:
    before, canary = document("dev", "kuberay"), "0a" * 32
    arms = (
        ArmRoute(arm=Arm.CANARY, release=canary, weight_bp=500),
        ArmRoute(arm=Arm.STABLE, release=RELEASE, weight_bp=9500),
    )
    routing = Routing(salt="s", rollout="r", arms=arms)
    after = with_target(before, TrafficTarget(routing=routing, releases=(RELEASE, canary)))
    assert [one["name"] for one in after["applications"]] == [RELEASE, canary, "outcomes", "router"]


def test_outcomes_are_where_their_file_is() -> None:
    objects = rendered("production-cpu", "kuberay")
    cluster = named(objects, "RayService")["spec"]["rayClusterConfig"]
    outcomes = next(one for one in document("production-cpu", "kuberay")["applications"] if one["name"] == "outcomes")
    (wanted,) = outcomes["deployments"][0]["ray_actor_options"]["resources"]
    assert wanted in cluster["headGroupSpec"]["rayStartParams"]["resources"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert str(Path(outcomes["args"]["state"]).parent) in mounts
    for group in cluster["workerGroupSpecs"]:
        assert "resources" not in group["rayStartParams"]


@pytest.mark.parametrize("component", ["kuberay", "static"])
def test_ray_is_set_as_it_was_measured(component: str) -> None:
    environment = ray_environment(component)
    assert {name: environment.get(name) for name in SERVE_SETTINGS} == SERVE_SETTINGS
    # At Ray's own minute a worker serves on for up to that long after a head that has lost its state came back.
    assert environment["RAY_raylet_liveness_self_check_interval_ms"] == "2000"


@pytest.mark.parametrize(("environment", "drain_s"), [("dev", 5), ("production-cpu", 30)])
@pytest.mark.parametrize("component", ["kuberay", "static"])
def test_ray_has_moved_its_replicas_away_before_the_pod_is_killed(
    environment: str, component: str, drain_s: int
) -> None:
    grace_s = head_of(environment, component)["terminationGracePeriodSeconds"]
    assert ray_environment(component, environment)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(drain_s)
    assert drain_s + 10 <= grace_s  # 5 s of preStop, and what its processes need to end


@pytest.mark.parametrize("component", ["kuberay", "static"])
def test_a_head_is_looked_at_from_its_first_second_on_where_its_agent_answers(component: str) -> None:
    head = head_of("dev", component)["containers"][0]
    assert head["startupProbe"]["periodSeconds"] <= 2
    assert head["startupProbe"].get("initialDelaySeconds", 0) == 0
    asked = head["readinessProbe"]["httpGet"]
    environment = rendered("dev", component)
    if component == "kuberay":
        start = named(environment, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]
        assert str(asked["port"]) == start["dashboard-agent-listen-port"]
    assert asked["path"] == "/api/healthz"  # with no readinessProbe of ours KubeRay gives one that waits for 10 s


def test_a_jobs_pods_are_looked_at_from_their_first_second_on() -> None:
    templates = named(rendered("dev", "kuberay"), "ConfigMap", "-jobs")["data"]
    jobs = [text for name, text in templates.items() if name.endswith(".yaml")]
    assert jobs
    for text in jobs:
        cluster = yaml.safe_load(text)["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            container = group["template"]["spec"]["containers"][0]
            assert container["startupProbe"]["periodSeconds"] == 1
            assert "initialDelaySeconds" not in container["readinessProbe"]


def test_feast_is_given_a_store_whose_password_is_not_in_it() -> None:
    config = yaml.safe_load(
        named(rendered("dev", "redis-external"), "ConfigMap", "-features")["data"]["feature_store.yaml"]
    )
    assert config["online_store"]["type"] == "redis"
    host, password, *options = config["online_store"]["connection_string"].split(",")
    assert (host, password) == ("redis.test:6379", "password=${REDIS_PASSWORD}")
    assert "ssl=true" in options


def test_parity_is_written_where_the_operator_reads_it_from_what_the_routers_wrote() -> None:
    found = rendered("dev", "pvc")
    [cron] = [one for one in found if one["kind"] == "CronJob" and one["metadata"]["name"].endswith("-parity")]
    [replay] = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    told = dict(word.removeprefix("--").split("=", 1) for word in replay["command"] if word.startswith("--"))
    [deployment] = [one for one in found if one["kind"] == "Deployment"]
    [controller] = deployment["spec"]["template"]["spec"]["containers"]
    settings = yaml.safe_load(named(found, "ConfigMap", "-controller")["data"]["settings.yaml"])
    assert settings["parity_findings"] == told["report"]
    assert told["report"].startswith(next(m["mountPath"] for m in controller["volumeMounts"] if m["name"] == "store"))
    [router] = [one for one in document("dev", "jobs")["applications"] if one["name"] == "router"]
    assert router["args"]["vector_log"] == told["log"]
    group: Any = typer.main.get_command(build_app())
    for word in replay["command"][1:3]:
        group = group.get_command(click.Context(group), word)
    assert group.make_context("parity", replay["command"][3:]).params["report_to"] == told["report"]


def test_the_charts_canary_rules_are_the_packages() -> None:
    assert (CHART / "files" / "rules" / "canary.rules.yaml").read_text() == canary_rules()


def test_the_readmes_table_is_of_these_values(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "reelway")
    command = [program("helm-docs"), "--chart-search-root", str(tmp_path), "--sort-values-order", "file", "-l", "error"]
    subprocess.run(command, check=True)
    assert (tmp_path / "reelway" / "README.md").read_text() == (CHART / "README.md").read_text(), (
        "run `helm-docs --chart-search-root charts --sort-values-order file`"
    )


def test_every_panel_asks_for_a_metric_that_somebody_counts() -> None:
    code = "\n".join(
        path.read_text() for part in ("platform", "serving") for path in (CHART.parents[1] / part).rglob("*.py")
    )
    boards = sorted((CHART / "files" / "dashboards").glob("*.json"))
    assert len(boards) >= 2
    for path in boards:
        board = json.loads(path.read_text())
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            for target in panel["targets"]:
                for metric in metrics(target["expr"]):
                    assert f'"{metric}"' in code or f'"{metric.removesuffix("_total")}"' in code, (
                        panel["title"],
                        metric,
                    )


def test_every_panel_can_be_held_to_one_namespace() -> None:
    for path in sorted((CHART / "files" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        assert "namespace" in [variable["name"] for variable in board["templating"]["list"]]
        for panel in board["panels"]:
            for target in panel["targets"]:
                selectors = re.findall(r"\breelway[_:][a-z_:]+(\{[^}]*\})?", target["expr"])
                assert selectors
                assert all('namespace=~"$namespace"' in one for one in selectors), target["expr"]


def metrics(expression: str) -> set[str]:
    """Names of the time series in an expression, without what a histogram puts after them."""
    names = re.findall(r"reelway_[a-z_]+", expression)
    found = {name.removesuffix("_bucket").removesuffix("_count") for name in names}
    assert found, expression
    return found
