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

    def says(self, *words: str) -> Result:
        return CliRunner().invoke(build_app(), ["rollout", *words, "-n", self._namespace])

    def starts(self, release: str, policy: str, *words: str) -> Result:
        where = ("--serve-api", self._serve.url, "--serve-url", self._serve.url)
        return self.says("start", release, "--policy", str(self._folder / policy), *where, *words)


@pytest.fixture
def person(api: KubeApi, serve: FakeServe, tmp_path: Path) -> CommandLineUser:
    return CommandLineUser(api, serve, tmp_path)


def test_started_rollout_is_followed_until_promoted(
    api: KubeApi, kubectl: Kubectl, person: CommandLineUser, serve: FakeServe, tmp_path: Path
) -> None:
    with operating(api, settings_of(serve, tmp_path)):
        done = person.starts(GOOD, "quick", "--wait", "--timeout", "60", "--note", "try it")
        assert done.exit_code == 0, done.output
        assert f"rolling out {GOOD[:12]} over {STABLE[:12]}, policy quick" in done.output
        status = json.loads(person.says("status", "-o", "json").output)
        assert status["rollout"]["phase"] == "promoted"
        assert status["rollout"]["exit_code"] == 0
        assert "all traffic is on bbbbbbbbbbbb" in person.says("history").output
        assert "try it" in kubectl.run("get", "events")
        assert "long_watch_rate" in person.says("explain").output
        again = person.starts(GOOD, "quick")
        assert isinstance(again.exception, RolloutError)
        assert "is already live" in str(again.exception)


def test_commands_report_their_effect(
    api: KubeApi, kubectl: Kubectl, person: CommandLineUser, serve: FakeServe, tmp_path: Path
) -> None:
    with operating(api, settings_of(serve, tmp_path)):
        begun = person.starts(GOOD, "held")
        assert begun.exit_code == 0, begun.output
        assert f"reelway rollout watch --namespace {api.namespace}" in begun.output
        until(lambda: len(serve.routing.arms) == 2)
        waiting = person.starts(BAD, "quick")
        assert waiting.exit_code == 0, waiting.output
        first = begun.output.split()[0]
        assert "cccccccccccc" in person.says("status", waiting.output.split()[0]).output
        back = person.says("rollback", first, "--wait", "--note", "enough")
        assert back.exit_code == 0, back.output
        assert "enough" in kubectl.read(first.rsplit("-", 1)[0])["status"]["history"][-1]["reason"]
        refused = person.says("pause", first)
        assert isinstance(refused.exception, RolloutError)


def test_status_says_that_no_operator_runs(person: CommandLineUser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_cluster, "ADMISSION_TIMEOUT_S", 0.2)
    begun = person.starts(GOOD, "quick")
    assert begun.exit_code == 0, begun.output
    assert "the operator has not observed the rollout yet" in person.says("status").output


def test_ambiguous_backend_or_release_is_rejected(person: CommandLineUser) -> None:
    nowhere = person.says("start", GOOD)
    assert isinstance(nowhere.exception, ConfigError)
    assert "select one with --ray-service" in str(nowhere.exception)
    short = person.says("start", "b" * 12, "--ray-service", "reelway")
    assert isinstance(short.exception, ConfigError)
    assert "0 Releases of namespace" in str(short.exception)
    nothing = person.says("history")
    assert isinstance(nothing.exception, RolloutError)
    assert "no rollout exists" in str(nothing.exception)


def test_release_is_found_by_its_prefix(
    kubectl: Kubectl, person: CommandLineUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubectl.apply({
        "apiVersion": "reelway.dev/v1alpha1", "kind": "Release", "metadata": {"name": GOOD[:12]},
        "spec": {"id": GOOD, "store": "s3://releases"},
    })  # fmt: skip
    monkeypatch.setattr(rollout_cluster, "ADMISSION_TIMEOUT_S", 0.2)
    begun = person.starts("bbb", "quick")
    name = begun.output.split()[0].rsplit("-", 1)[0]
    assert kubectl.read(name)["spec"]["release"] == GOOD
