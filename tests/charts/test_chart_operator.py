"""The operator's pod and settings file as the chart renders them, read by the operator's own command and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from tests.support.charts.chart_tool import (
    ENVIRONMENT_FILES,
    ENVIRONMENTS,
    NEEDED,
    Document,
    documents,
    helm_template,
    merged,
    rendered,
)

from reelway.platform.cli.main import build_app
from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.rollout.control.controller_settings import AlertmanagerSettings, PrometheusSettings

COMPONENT = "operator"


def find(objects: tuple[Document, ...], kind: str) -> Document:
    (found,) = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == f"rw-reelway-{COMPONENT}"]
    return found


def settings_of(objects: tuple[Document, ...]) -> OperatorSettings:
    return OperatorSettings(**yaml.safe_load(find(objects, "ConfigMap")["data"]["settings.yaml"]))


def rendered_with(values: dict[str, Any]) -> tuple[Document, ...]:
    """The development environment with further values of the operator."""
    files = [ENVIRONMENTS / name for name in ENVIRONMENT_FILES["dev"]]
    result = helm_template(merged(NEEDED, {COMPONENT: values}), *files)
    assert result.returncode == 0, result.stderr
    return documents(result.stdout)


@pytest.mark.parametrize("environment", ["dev", "production-cpu", "air-gapped"])
def test_operator_accepts_its_arguments_with_its_settings(environment: str) -> None:
    objects = rendered(environment, "as-is")
    container = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    name, *arguments = container["args"]
    command: Any = typer.main.get_command(build_app())
    context = command.get_command(click.Context(command), name).make_context(name, list(arguments))
    assert context.params["namespace"] == "reelway"
    folders = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert context.params["config"] == Path(folders["settings"]) / "settings.yaml"
    settings = settings_of(objects)
    assert settings.webhook.port == 9094
    assert settings.lease.name == f"rw-reelway-{COMPONENT}"


@pytest.mark.parametrize("environment", ["dev", "production-cpu", "air-gapped"])
def test_every_file_of_the_settings_is_mounted(environment: str) -> None:
    objects = rendered(environment, "as-is")
    container = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    folders = {mount["mountPath"] for mount in container["volumeMounts"]}
    settings = settings_of(objects)
    files = [settings.webhook.token_file, settings.ray.token_file, settings.ranker_template]
    files += [group.token_file for group in (settings.prometheus, settings.alertmanager)]
    files += [group.ca_file for group in (settings.prometheus, settings.alertmanager)]
    assert {str(path.parent) for path in files if path is not None} <= folders


def test_monitoring_values_are_settings_of_the_operator() -> None:
    objects = rendered_with(
        {
            "prometheusUrl": "https://prometheus.test",
            "prometheusAccess": {"tokenSecret": "p", "caConfigMap": "ca", "labels": {"cluster": "1"}},
            "alertmanagerUrl": "http://alertmanager.test",
        }
    )
    settings = settings_of(objects)
    assert settings.prometheus == PrometheusSettings(
        url="https://prometheus.test",
        token_file=Path("/etc/reelway/monitoring/prometheus.token"),
        ca_file=Path("/etc/reelway/monitoring/prometheus.ca.crt"),
        labels={"cluster": "1"},
    )
    assert settings.alertmanager == AlertmanagerSettings(url="http://alertmanager.test")


def test_changed_settings_replace_the_operator_pods() -> None:
    def checksum(interval_s: int) -> str:
        template = find(rendered_with({"intervalSeconds": interval_s}), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["reelway.dev/settings-checksum"])

    assert checksum(1) == checksum(1)
    assert checksum(1) != checksum(2)
