"""What the chart renders for Serve, Feast and the operator is what these programs read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import click
import pytest
import typer.main
import yaml
from tests.support.charts.chart_tool import CHART, COMBINATIONS, RELEASE, Document, named, program, rendered

from reelway.platform.cli.main import build_app
from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.cluster.ray_service import OPTIONS_DIGEST
from reelway.platform.cluster.serve_config_reconciler import OPTIONS_KEY, OPTIONS_SUFFIX, digest_of
from reelway.platform.features.feast_store import online_store_config, write_store_config
from reelway.platform.rollout.policy import default_policy
from reelway.platform.rollout.rules import canary_rules
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import compose_serve_config
from reelway.platform.rollout.traffic.serving_options import (
    OutcomesArgs,
    ReleaseArgs,
    ReleaseStoreArgs,
    RouterArgs,
    ServingOptions,
)
from reelway.serving.serve_settings import SERVE_SETTINGS


def serving_options(environment: str, component: str) -> ServingOptions:
    """The options that the operator reads from the cluster."""
    text = named(rendered(environment, component), "ConfigMap", "-serving")["data"]["options.yaml"]
    return ServingOptions.parse(text, source="options.yaml")


def serve_config(environment: str, component: str) -> Document:
    """What the operator composes for a new installation."""
    options = serving_options(environment, component)
    assert options.initial is not None
    return compose_serve_config(options, options.initial.routing.releases, options.initial.routing)


def ray_cluster(environment: str, component: str) -> Document:
    found: Document = named(rendered(environment, component), "RayService")["spec"]["rayClusterConfig"]
    return found


def head_of(environment: str, component: str) -> dict[str, Any]:
    """The pod specification of Ray's head."""
    found: dict[str, Any] = ray_cluster(environment, component)["headGroupSpec"]["template"]["spec"]
    return found


def ray_environment(environment: str = "dev") -> dict[str, str | None]:
    """Environment of the head's Ray container."""
    return {one["name"]: one.get("value") for one in head_of(environment, "as-is")["containers"][0]["env"]}


LIVE_BY_ENVIRONMENT: Final = {("production-cpu", "kserve"), ("production-cpu", "redis-external")}
"""This environment names an event log itself."""


@pytest.mark.parametrize("component", ["not-live", "live", "kserve", "redis-external"])
@pytest.mark.parametrize("environment", ["dev", "production-cpu", "air-gapped"])
def test_operator_composes_a_serve_config_from_the_options(environment: str, component: str) -> None:
    applications = {one["name"]: one for one in serve_config(environment, component)["applications"]}
    assert set(applications) == {RELEASE, "outcomes", "router"}
    assert ReleaseArgs(**applications[RELEASE]["args"]).release == RELEASE
    events = serving_options(environment, component).events
    assert (events is not None) is (component == "live" or (environment, component) in LIVE_BY_ENVIRONMENT)
    routed = RouterArgs(**applications["router"]["args"])
    assert (routed.events, routed.log_keeper) == (events, None if events else "outcomes")
    summed = OutcomesArgs(**applications["outcomes"]["args"])
    assert summed.events == (events or "/var/lib/reelway/state/events")
    assert applications[RELEASE]["args"]["events"] == events
    assert (applications[RELEASE]["args"]["overlay"] is None) is (events is None)
    (router,) = applications["router"]["deployments"]
    assert Routing.model_validate(router["user_config"]) == Routing.single_release(RELEASE)


@pytest.mark.parametrize("environment", ["dev", "production-cpu", "air-gapped"])
def test_fused_release_runs_in_the_routers(environment: str) -> None:
    applications = {one["name"]: one for one in serve_config(environment, "fused")["applications"]}
    assert [one["name"] for one in applications[RELEASE]["deployments"]] == ["Release"]
    assert {applications[name]["args"]["composition"] for name in (RELEASE, "router")} == {"fused"}


def test_cluster_config_differs_from_local_mode_in_paths_with_sizes_only() -> None:
    releases = ReleaseStoreArgs(release_store="x", release_cache=Path("x"), public_keys=Path("x"))
    options = ServingOptions(releases=releases, metrics_dir=Path("x"), outcomes=Path("x"))
    local = compose_serve_config(options, (RELEASE,), Routing.single_release(RELEASE))
    cluster = serve_config("dev", "as-is")
    assert [shape(one) for one in cluster["applications"]] == [shape(one) for one in local["applications"]]


def shape(application: Document) -> dict[str, Any]:
    return {
        **{key: application[key] for key in ("name", "route_prefix", "import_path", "logging_config")},
        "args": sorted(application["args"]),
        "environment": sorted(application["runtime_env"]["env_vars"]),
        "deployments": [(one["name"], one.get("user_config")) for one in application["deployments"]],
    }


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_ray_service_carries_the_digest_of_its_options(environment: str, component: str) -> None:
    """The operator applies options only if pod template and options were rendered together."""
    if component == "no-service":
        assert not [one for one in rendered(environment, component) if one["kind"] == "RayService"]
        return
    objects = rendered(environment, component)
    options = named(objects, "ConfigMap", OPTIONS_SUFFIX)
    service = named(objects, "RayService")["metadata"]
    assert service["annotations"][OPTIONS_DIGEST] == digest_of(options["data"][OPTIONS_KEY])
    assert options["metadata"]["name"] == service["name"] + OPTIONS_SUFFIX


def test_kserve_rankers_are_addressed_by_release() -> None:
    release = serve_config("dev", "kserve")["applications"][0]
    assert release["args"]["ranker_address"] == "dns:///rw-reelway-{release}-predictor.reelway.svc:8081"


def test_outcomes_run_where_their_file_is() -> None:
    cluster = ray_cluster("production-cpu", "as-is")
    outcomes = next(one for one in serve_config("production-cpu", "as-is")["applications"] if one["name"] == "outcomes")
    (resource,) = outcomes["deployments"][0]["ray_actor_options"]["resources"]
    assert resource in cluster["headGroupSpec"]["rayStartParams"]["resources"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert str(Path(outcomes["args"]["state"]).parent) in mounts
    for group in cluster["workerGroupSpecs"]:
        assert "resources" not in group["rayStartParams"]


def test_ray_has_the_measured_low_latency_settings() -> None:
    environment = ray_environment()
    assert {name: environment.get(name) for name in SERVE_SETTINGS} == SERVE_SETTINGS
    # With Ray's default of 60 s a worker serves on for up to that long after a head without state has started.
    assert environment["RAY_raylet_liveness_self_check_interval_ms"] == "2000"


@pytest.mark.parametrize(("environment", "drain_s"), [("dev", 5), ("production-cpu", 30)])
def test_ray_drains_replicas_before_the_grace_period_ends(environment: str, drain_s: int) -> None:
    grace_s = head_of(environment, "as-is")["terminationGracePeriodSeconds"]
    assert ray_environment(environment)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(drain_s)
    assert drain_s + 10 <= grace_s  # 5 s of preStop, and 5 s for the processes to exit


def test_head_is_probed_at_its_agent_from_the_first_second() -> None:
    """Without a readinessProbe KubeRay adds one that starts after 10 s."""
    head = head_of("dev", "as-is")["containers"][0]
    assert head["startupProbe"]["periodSeconds"] <= 2
    assert head["startupProbe"].get("initialDelaySeconds", 0) == 0
    probe = head["readinessProbe"]["httpGet"]
    start = ray_cluster("dev", "as-is")["headGroupSpec"]["rayStartParams"]
    assert str(probe["port"]) == start["dashboard-agent-listen-port"]
    assert probe["path"] == "/api/healthz"


def test_job_pods_are_probed_from_the_first_second() -> None:
    templates = named(rendered("dev", "as-is"), "ConfigMap", "-jobs")["data"]
    jobs = [text for name, text in templates.items() if name.endswith(".yaml")]
    assert jobs
    for text in jobs:
        cluster = yaml.safe_load(text)["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            container = group["template"]["spec"]["containers"][0]
            assert container["startupProbe"]["periodSeconds"] == 1
            assert "initialDelaySeconds" not in container["readinessProbe"]


def test_feast_config_contains_no_password() -> None:
    config = yaml.safe_load(
        named(rendered("dev", "redis-external"), "ConfigMap", "-features")["data"]["feature_store.yaml"]
    )
    assert config["online_store"] == online_store_config("rediss://redis.test:6379/0")


def test_feast_config_names_the_stores_of_a_run(tmp_path: Path) -> None:
    """The pods' file and the one that a features job writes open the same kinds of stores in the same way."""
    chart = yaml.safe_load(
        named(rendered("dev", "redis-external"), "ConfigMap", "-features")["data"]["feature_store.yaml"]
    )
    run = yaml.safe_load(write_store_config(tmp_path, "rediss://redis.test:6379").read_text())
    assert chart["offline_store"] == run["offline_store"]
    assert chart["entity_key_serialization_version"] == run["entity_key_serialization_version"]
    assert chart["online_store"] == run["online_store"]
    assert chart.keys() == run.keys()


def parity_container(found: tuple[Document, ...]) -> Document | None:
    jobs = [one for one in found if one["kind"] == "CronJob" and one["metadata"]["name"].endswith("-parity")]
    return jobs[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0] if jobs else None


def operator_findings(found: tuple[Document, ...]) -> str | None:
    findings: str | None = yaml.safe_load(named(found, "ConfigMap", "-operator")["data"]["settings.yaml"])[
        "parity_findings"
    ]
    return findings


@pytest.mark.parametrize("component", ["parity-volume", "parity-s3"])
def test_parity_job_connects_the_routers_log_with_the_operator(component: str) -> None:
    found = rendered("dev", component)
    replay = parity_container(found)
    assert replay is not None
    options = dict(word.removeprefix("--").split("=", 1) for word in replay["command"] if word.startswith("--"))
    assert operator_findings(found) == options["report"]
    [router] = [one for one in serve_config("dev", component)["applications"] if one["name"] == "router"]
    assert router["args"]["vector_log"] == options["log"]
    group: Any = typer.main.get_command(build_app())
    for word in replay["command"][1:3]:
        group = group.get_command(click.Context(group), word)
    assert group.make_context("parity", replay["command"][3:]).params["report_to"] == options["report"]


def test_parity_on_an_object_store_needs_no_volume() -> None:
    replay = parity_container(rendered("dev", "parity-s3"))
    assert replay is not None
    urls = [word.partition("=")[2] for word in replay["command"] if word.startswith(("--run", "--log", "--report"))]
    assert all(url.startswith("s3://") for url in urls)
    assert [mount["name"] for mount in replay["volumeMounts"]] == ["tmp"]
    assert {"AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID"} <= {variable["name"] for variable in replay["env"]}


@pytest.mark.parametrize("component", ["as-is", "s3", "parity-volume", "parity-s3"])
def test_policy_requires_parity_only_where_a_job_produces_it(component: str) -> None:
    found = rendered("dev", component)
    findings = operator_findings(found)
    assert (findings is not None) == (parity_container(found) is not None)
    [router] = [one for one in serve_config("dev", component)["applications"] if one["name"] == "router"]
    assert (router["args"].get("vector_log") is not None) == (findings is not None)
    policy = default_policy(parity=OperatorSettings(parity_findings=findings).parity_findings is not None)
    assert (policy.guardrails.parity_mismatches is not None) == (findings is not None)


def test_canary_rules_equal_those_of_the_package() -> None:
    assert (CHART / "files" / "rules" / "canary.rules.yaml").read_text() == canary_rules()


def test_readme_is_generated_from_the_values(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "reelway")
    command = [program("helm-docs"), "--chart-search-root", str(tmp_path), "--sort-values-order", "file", "-l", "error"]
    subprocess.run(command, check=True)
    assert (tmp_path / "reelway" / "README.md").read_text() == (CHART / "README.md").read_text(), (
        "run `helm-docs --chart-search-root charts --sort-values-order file`"
    )


def test_every_panel_shows_a_metric_of_the_code() -> None:
    code = code_of_members()
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


def test_every_panel_filters_by_namespace() -> None:
    for path in sorted((CHART / "files" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        assert "namespace" in [variable["name"] for variable in board["templating"]["list"]]
        for panel in board["panels"]:
            for target in panel["targets"]:
                selectors = re.findall(r"\breelway[_:][a-z_:]+(\{[^}]*\})?", target["expr"])
                assert selectors
                assert all('namespace=~"$namespace"' in one for one in selectors), target["expr"]


def test_every_live_alert_uses_a_metric_of_the_code() -> None:
    code = code_of_members()
    groups = yaml.safe_load((CHART / "files" / "rules" / "live.rules.yaml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        for metric in metrics(rule["expr"]):
            assert f'"{metric}"' in code, (rule["alert"], metric)


def code_of_members() -> str:
    parts = ("platform", "serving", "pipelines")
    return "\n".join(path.read_text() for part in parts for path in (CHART.parents[1] / part / "src").rglob("*.py"))


def metrics(expression: str) -> set[str]:
    """Names of the metrics in an expression, without the suffixes of histograms."""
    names = re.findall(r"reelway_[a-z_]+", expression)
    found = {name.removesuffix("_bucket").removesuffix("_count") for name in names}
    assert found, expression
    return found
