"""The live parts run wherever an event log is named: feature stream, overlay writer, catalogue API, topics."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any, Final

import click
import pytest
import typer.main
import yaml
from tests.support.charts.chart_tool import (
    CHART,
    COMPONENTS,
    ENVIRONMENT_FILES,
    ENVIRONMENTS,
    NEEDED,
    Document,
    merged,
    named,
    program,
    rendered,
)

from reelway.platform.cli.main import build_app
from reelway.platform.eventlog.kafka_topics import TopicSizes

PARTS: Final = ("stream", "overlay", "catalogue")
KINDS: Final = {"stream": "StatefulSet", "overlay": "StatefulSet", "catalogue": "Deployment"}
EVENTS: Final = "kafka://kafka-0.test:9092,kafka-1.test:9093/live-"


def pod_of(objects: tuple[Document, ...], part: str) -> Document:
    pod: Document = named(objects, KINDS[part], f"-{part}")["spec"]["template"]["spec"]
    return pod


def topics_job(objects: tuple[Document, ...]) -> Document:
    (job,) = [one for one in objects if one["kind"] == "Job" and "-topics-" in one["metadata"]["name"]]
    return job


def parsed(container: Document) -> dict[str, Any]:
    """The container's arguments as its command parses them."""
    words: list[str] = [*container["command"], *container["args"]]
    assert words.pop(0) == "reelway"
    command: Any = typer.main.get_command(build_app())
    context = click.Context(command)
    while words and not words[0].startswith("-"):
        command = command.get_command(context, words.pop(0))
        context = click.Context(command, parent=context)
    found: dict[str, Any] = command.make_context(command.name, words).params
    return found


def components_of(objects: tuple[Document, ...]) -> set[str]:
    """Components of all pods outside of jobs."""
    found = set()
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet", "Job"):
            found.add(one["spec"]["template"]["metadata"]["labels"]["reelway.dev/component"])
    return found


@pytest.mark.parametrize("environment", ENVIRONMENT_FILES)
def test_live_parts_run_if_an_event_log_is_named(environment: str) -> None:
    assert {*PARTS, "topics"} <= components_of(rendered(environment, "live"))
    assert not {*PARTS, "topics"} & components_of(rendered(environment, "not-live"))


def test_each_live_part_can_be_switched_off() -> None:
    assert not set(PARTS) & components_of(rendered("dev", "live-in-part"))
    assert "topics" not in components_of(rendered("dev", "live-elsewhere"))


@pytest.mark.parametrize("component", ["live", "live-elsewhere"])
@pytest.mark.parametrize("environment", ["dev", "production-cpu", "air-gapped"])
@pytest.mark.parametrize("part", PARTS)
def test_live_part_accepts_its_arguments(part: str, environment: str, component: str) -> None:
    objects = rendered(environment, component)
    pod = pod_of(objects, part)
    (container,) = pod["containers"]
    options = parsed(container)
    assert options["events"] == COMPONENTS[component]["eventLog"]["address"]
    assert options["port" if part == "catalogue" else "metrics_port"] == container["ports"][0]["containerPort"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for word in container["args"]:
        path = word.partition("=")[2]
        assert not path.startswith("/") or any(path.startswith(mount) for mount in mounts), word


@pytest.mark.parametrize(("component", "expected"), [("live", None), ("live-elsewhere", "s3://features/overlay")])
@pytest.mark.parametrize("environment", ["dev", "production-cpu", "air-gapped"])
def test_writers_share_the_overlay_with_serving_pods(environment: str, component: str, expected: str | None) -> None:
    objects = rendered(environment, component)
    options = yaml.safe_load(named(objects, "ConfigMap", "-serving")["data"]["options.yaml"])
    overlay = options["releases"]["overlay"]
    store = options["releases"]["release_store"]
    assert overlay == (expected or store.removesuffix("releases") + "overlay")
    for part in ("stream", "overlay"):
        assert parsed(pod_of(objects, part)["containers"][0])["overlay"] == overlay
    if overlay.startswith("/"):
        (head,) = [
            container
            for container in named(objects, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"][
                "spec"
            ]["containers"]
            if container["name"] == "ray"
        ]
        claims = {
            pod["volumes"][index]["persistentVolumeClaim"]["claimName"]
            for pod in (pod_of(objects, "stream"), pod_of(objects, "overlay"))
            for index, volume in enumerate(pod["volumes"])
            if volume["name"] == "store"
        }
        assert len(claims) == 1
        assert any(overlay.startswith(mount["mountPath"]) for mount in head["volumeMounts"])


def test_overlay_has_one_writer_that_stops_before_its_successor_starts() -> None:
    for environment in ENVIRONMENT_FILES:
        overlay = named(rendered(environment, "live"), "StatefulSet", "-overlay")["spec"]
        assert overlay["replicas"] == 1
        assert overlay.get("podManagementPolicy", "OrderedReady") == "OrderedReady"


@pytest.mark.parametrize("part", ["stream", "overlay"])
def test_state_is_persistent_unless_switched_off(part: str) -> None:
    kept = named(rendered("production-cpu", "live"), "StatefulSet", f"-{part}")["spec"]
    (claim,) = kept["volumeClaimTemplates"]
    assert (claim["metadata"]["name"], claim["spec"]["storageClassName"]) == ("state", "fast")
    lost = named(rendered("dev", "live"), "StatefulSet", f"-{part}")["spec"]
    assert "volumeClaimTemplates" not in lost
    assert [one for one in lost["template"]["spec"]["volumes"] if one["name"] == "state" and "emptyDir" in one]
    for spec in (kept, lost):
        mounts = spec["template"]["spec"]["containers"][0]["volumeMounts"]
        assert [mount for mount in mounts if mount["name"] == "state"]


def test_stream_pods_have_a_disruption_budget() -> None:
    objects = rendered("production-cpu", "live")
    budget = named(objects, "PodDisruptionBudget", "-stream")["spec"]
    labels = named(objects, "StatefulSet", "-stream")["spec"]["template"]["metadata"]["labels"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= labels.items()


def test_topics_are_created_before_pods_with_the_sizes_of_the_values() -> None:
    job = topics_job(rendered("production-cpu", "live"))
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert int(job["metadata"]["annotations"]["helm.sh/hook-weight"]) > 0  # after the Secret
    pod = job["spec"]["template"]["spec"]
    assert "serviceAccountName" not in pod  # the chart's account does not exist before the first install
    options = parsed(pod["containers"][0])
    assert options.pop("events") == EVENTS
    assert TopicSizes(**options) == TopicSizes(12, 3, 3, 2, 168) == TopicSizes()
    dev = parsed(topics_job(rendered("dev", "live"))["spec"]["template"]["spec"]["containers"][0])
    assert (dev["viewer_partitions"], dev["replication"], dev["min_in_sync"]) == (2, 1, 1)


def test_generated_secret_has_every_key_that_pods_read() -> None:
    objects = rendered("dev", "live")
    (job,) = [one for one in objects if one["kind"] == "Job" and "-secrets-" in one["metadata"]["name"]]
    name, *keys = job["spec"]["template"]["spec"]["containers"][0]["args"][1:]
    assert pod_of(objects, "catalogue")["volumes"][1]["secret"]["secretName"] == name
    read = {
        one["key"]
        for value in walk(list(objects))
        if isinstance(value, dict)
        for one in (
            value.get("items", []) if value.get("secretName") == name else [value] if value.get("name") == name else []
        )
        if "key" in one
    }
    assert {"catalogue-token", "auth_token", "impression-tokens"} <= read <= set(keys)


@pytest.mark.parametrize(
    ("component", "kind"), [("ingress", "Ingress"), ("http-route", "HTTPRoute")]
)  # fmt: skip
def test_no_route_publishes_the_catalogue_or_the_sums(component: str, kind: str) -> None:
    objects = rendered("production-cpu", component)  # this environment names an event log
    assert "catalogue" in components_of(objects)
    route = named(objects, kind)
    text = yaml.safe_dump(route)
    assert "catalogue" not in text
    paths = [value for value in walk(route) if isinstance(value, str) and value.startswith("/")]
    assert sorted(paths) == ["/v1/outcomes", "/v1/recommend"]
    assert "Prefix" not in text
    assert named(objects, "Service", "-catalogue")["spec"].get("type", "ClusterIP") == "ClusterIP"


def walk(value: Any) -> Iterator[Any]:
    yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(one)


READERS_OF_THE_LOG: Final = {"serving", "stream", "overlay", "catalogue", "topics", "jobs"}


@pytest.mark.parametrize(("component", "ports"), [("live", {9092, 9093}), ("live-elsewhere", {9092}), ("not-live", {})])
def test_only_readers_of_the_log_reach_kafka(component: str, ports: set[int]) -> None:
    policies = [one for one in rendered("dev", component) if one["kind"] == "NetworkPolicy"]
    found: dict[str, list[Document]] = {}
    for one in policies:
        name = one["spec"]["podSelector"]["matchLabels"].get("reelway.dev/component")
        rules = [
            rule
            for rule in one["spec"].get("egress", ())
            if {port["port"] for port in rule.get("ports", ())} & {9092, 9093}
        ]
        if rules:
            found[name] = rules
    expected = READERS_OF_THE_LOG - ({"topics"} if component == "live-elsewhere" else set())
    assert set(found) == (expected if ports else set())
    for (rule,) in found.values():
        assert {port["port"] for port in rule["ports"]} == ports
        assert rule.get("to", []) == COMPONENTS[component].get("networkPolicies", {}).get("kafka", [])


def test_only_named_peers_call_the_catalogue() -> None:
    closed = named(rendered("dev", "live"), "NetworkPolicy", "-catalogue")["spec"]["ingress"]
    monitoring = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert [rule["from"] for rule in closed] == [monitoring]
    (rule,) = named(rendered("dev", "live-elsewhere"), "NetworkPolicy", "-catalogue")["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app": "uploads"}}}, *monitoring]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8085}]


def test_metrics_port_of_each_part_is_scraped_and_reachable() -> None:
    objects = rendered("dev", "live")
    for part in PARTS:
        (container,) = pod_of(objects, part)["containers"]
        (endpoint,) = named(objects, "PodMonitor", f"-{part}")["spec"]["podMetricsEndpoints"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        reachable = [
            port["port"]
            for rule in named(objects, "NetworkPolicy", f"-{part}")["spec"]["ingress"]
            for port in rule["ports"]
        ]
        assert ports[endpoint["port"]] in reachable
        assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": f"reelway-{part}"}]


@pytest.mark.parametrize(
    ("component", "words"),
    [
        ("live", ["/v1/catalogue", "catalogue-token"]),
        ("live-in-part", ["stream.enabled is false", "overlay.enabled is false", "catalogue.enabled is false"]),
        ("not-live", ["eventLog.address", "uploads and takedowns wait for the next release", "while it is down"]),
    ],
)
def test_notes_state_what_is_lost(component: str, words: list[str], tmp_path: Any) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(merged(NEEDED, COMPONENTS[component])))
    files = [f"--values={ENVIRONMENTS / name}" for name in ENVIRONMENT_FILES["production-cpu"]]
    command = [program("helm"), "install", "rw", str(CHART), "--dry-run=client", *files, f"--values={values}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    notes = done.stdout.partition("\nNOTES:")[2]
    assert [word for word in words if word not in notes] == []
    assert ("No event log is named" in notes) is (component == "not-live")


@pytest.mark.parametrize("component", ["live", "live-elsewhere", "live-in-part", "not-live", "jobs"])
@pytest.mark.parametrize("environment", ENVIRONMENT_FILES)
def test_every_argument_has_a_value(environment: str, component: str) -> None:
    """A template that names a value by an old path renders an empty argument."""
    for value in walk(list(rendered(environment, component))):
        if isinstance(value, dict) and "containers" in value:
            for container in value["containers"]:
                for word in (*container.get("command", ()), *container.get("args", ())):
                    assert word, container["name"]
                    assert "<nil>" not in word, word
                    assert not (word.startswith("--") and word.endswith("=")), word
