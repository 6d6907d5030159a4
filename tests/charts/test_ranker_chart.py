"""The InferenceService of a release's ranker: its containers and the options that they pass."""

from __future__ import annotations

from typing import Any

import pytest
import typer
import yaml
from tests.support.charts.chart_tool import (
    ENVIRONMENTS,
    LOADER,
    NEEDED,
    RELEASE,
    documents,
    helm_template,
    merged,
    named,
)

from reelway.platform.cli.main import build_app


@pytest.fixture(scope="module")
def pods() -> list[dict[str, Any]]:
    """The pods of the InferenceServices that the operator creates from the template."""
    done = helm_template(merged(NEEDED, {"ranker": {"backend": "kserve"}}), ENVIRONMENTS / "dev.yaml")
    assert done.returncode == 0, done.stderr
    objects = documents(done.stdout)
    template = named(objects, "ConfigMap", "-ranker")["data"]["inference-service.yaml"]
    filled = template.replace("{release_id}", RELEASE).replace("{release}", RELEASE[:12])
    services = [yaml.load(filled, Loader=LOADER)]
    return [service["spec"]["predictor"] for service in services]


def options(container: dict[str, Any]) -> dict[str, Any]:
    """Parses the container's command line with the program's own parser."""
    words: list[str] = [*container["command"], *container["args"]]
    program = words.pop(0)
    assert program == "reelway"
    command: Any = typer.main.get_command(build_app())
    context = None
    while hasattr(command, "commands"):
        context = typer.Context(command, parent=context)
        command = command.commands[words.pop(0)]
    parsed: dict[str, Any] = command.make_context("reelway", words, parent=context).params
    return parsed


def test_init_container_verifies_the_release_that_the_server_loads(pods: list[dict[str, Any]]) -> None:
    for pod in pods:
        (fetch,), (server,) = pod["initContainers"], pod["containers"]
        fetched, served = options(fetch), options(server)
        assert fetched["release"] == RELEASE
        assert fetched["verify_it"] is True
        assert served["release_dir"] == fetched["to"] / RELEASE
        mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
        assert mounts["cache"]["readOnly"] is True
        assert "public-keys" not in mounts


def test_server_drains_within_the_termination_grace_period(pods: list[dict[str, Any]]) -> None:
    for pod in pods:
        served = options(pod["containers"][0])
        assert served["max_queued_requests"] == 32
        assert served["drain_seconds"] + served["grace_seconds"] < pod["terminationGracePeriodSeconds"]
