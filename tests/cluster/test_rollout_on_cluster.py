"""``reelway rollout`` on a cluster: the same output, exit codes and effects as in local mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.support.cluster.fake_serve import BAD, GOOD, STABLE, FakeServe
from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.operator_runs import held, operating, settings_of, until
from tests.support.cluster.rollout_manifests import QUICK
from typer.testing import CliRunner, Result

from reelway.platform.cli.main import build_app
from reelway.platform.cli.rollout import cluster as rollout_cluster
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.errors import ConfigError, RolloutError

pytestmark = pytest.mark.cluster


class CommandLineUser:
    """Runs commands in the namespace."""

    def __init__(self, api: KubeApi, serve: FakeServe, folder: Path) -> None:
        self._namespace, self._serve = api.namespace, serve
        for name, policy in (("quick", QUICK), ("held", held())):
            (folder / name).write_text(yaml.safe_dump(policy))
        self._folder = folder

    def run(self, *args: str) -> Result:
        return CliRunner().invoke(build_app(), ["rollout", *args, "-n", self._namespace])

    def start_rollout(self, release: str, policy: str, *args: str) -> Result:
        service_options = ("--serve-api", self._serve.url, "--serve-url", self._serve.url)
        return self.run("start", release, "--policy", str(self._folder / policy), *service_options, *args)


@pytest.fixture
def user(api: KubeApi, serve: FakeServe, tmp_path: Path) -> CommandLineUser:
    return CommandLineUser(api, serve, tmp_path)


def test_started_rollout_is_followed_until_promoted(
    api: KubeApi, kubectl: Kubectl, user: CommandLineUser, serve: FakeServe, tmp_path: Path
) -> None:
    with operating(api, settings_of(serve, tmp_path)):
        promoted = user.start_rollout(GOOD, "quick", "--wait", "--timeout", "60", "--note", "try it")
        assert promoted.exit_code == 0, promoted.output
        assert f"rolling out {GOOD[:12]} over {STABLE[:12]}, policy quick" in promoted.output
        status = json.loads(user.run("status", "-o", "json").output)
        assert status["rollout"]["phase"] == "promoted"
        assert status["rollout"]["exit_code"] == 0
        assert "all traffic is on bbbbbbbbbbbb" in user.run("history").output
        assert "try it" in kubectl.run("get", "events")
        assert "long_watch_rate" in user.run("explain").output
        again = user.start_rollout(GOOD, "quick")
        assert isinstance(again.exception, RolloutError)
        assert "is already live" in str(again.exception)


def test_commands_report_their_effect(
    api: KubeApi, kubectl: Kubectl, user: CommandLineUser, serve: FakeServe, tmp_path: Path
) -> None:
    with operating(api, settings_of(serve, tmp_path)):
        started = user.start_rollout(GOOD, "held")
        assert started.exit_code == 0, started.output
        assert f"reelway rollout watch --namespace {api.namespace}" in started.output
        until(lambda: len(serve.routing.arms) == 2)
        waiting = user.start_rollout(BAD, "quick")
        assert waiting.exit_code == 0, waiting.output
        first = started.stdout.split()[0]
        assert "cccccccccccc" in user.run("status", waiting.stdout.split()[0]).output
        back = user.run("rollback", first, "--wait", "--note", "enough")
        assert back.exit_code == 0, back.output
        assert "enough" in kubectl.read(first.rsplit("-", 1)[0])["status"]["history"][-1]["reason"]
        rejected = user.run("pause", first)
        assert isinstance(rejected.exception, RolloutError)


def test_status_says_that_no_operator_runs(user: CommandLineUser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_cluster, "ADMISSION_TIMEOUT_S", 0.2)
    started = user.start_rollout(GOOD, "quick")
    assert started.exit_code == 0, started.output
    assert "the operator has not observed the rollout yet" in user.run("status").output


def test_ambiguous_backend_or_release_is_rejected(user: CommandLineUser) -> None:
    without_backend = user.run("start", GOOD)
    assert isinstance(without_backend.exception, ConfigError)
    assert "select one with --ray-service" in str(without_backend.exception)
    by_prefix = user.run("start", "b" * 12, "--ray-service", "reelway")
    assert isinstance(by_prefix.exception, ConfigError)
    assert "0 Releases of namespace" in str(by_prefix.exception)
    empty = user.run("history")
    assert isinstance(empty.exception, RolloutError)
    assert "no rollout exists" in str(empty.exception)


def test_release_is_found_by_its_prefix(
    kubectl: Kubectl, user: CommandLineUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubectl.apply({
        "apiVersion": "reelway.dev/v1alpha1", "kind": "Release", "metadata": {"name": GOOD[:12]},
        "spec": {"id": GOOD, "store": "s3://releases"},
    })  # fmt: skip
    monkeypatch.setattr(rollout_cluster, "ADMISSION_TIMEOUT_S", 0.2)
    started = user.start_rollout("bbb", "quick")
    name = started.stdout.split()[0].rsplit("-", 1)[0]
    assert kubectl.read(name)["spec"]["release"] == GOOD
