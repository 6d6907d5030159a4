"""Settings of the local controller: the same file format as the operator's, with options over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reelway.platform.cli.main import build_app
from reelway.platform.errors import ConfigError
from reelway.platform.rollout.control import local_controller
from reelway.platform.rollout.control.local_controller import ControllerSettings
from reelway.platform.settings import load_settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ControllerSettings]:
    """Settings that the command passes to the controller."""
    received: list[ControllerSettings] = []
    monkeypatch.setattr(local_controller, "run_controller", received.append)
    return received


def run_command(*args: str) -> Any:
    return CliRunner().invoke(build_app(), ["rollout", "controller", *args], catch_exceptions=False)


def test_options_override_the_settings_file(tmp_path: Path, started: list[ControllerSettings]) -> None:
    (tmp_path / "run.json").write_text("{}")
    config = tmp_path / "controller.yaml"
    config.write_text(
        "{interval_s: 3, webhook: {port: 9095}, prometheus: {url: 'http://p:9090', labels: {cluster: a}}}"
    )
    result = run_command("--run", str(tmp_path), "--config", str(config), "--prometheus-url", "http://other:9090")
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert (settings.interval_s, settings.webhook.port, settings.webhook.host) == (3.0, 9095, "127.0.0.1")
    assert (settings.prometheus.url, settings.prometheus.labels) == ("http://other:9090", {"cluster": "a"})


def test_command_runs_without_a_settings_file(tmp_path: Path, started: list[ControllerSettings]) -> None:
    assert run_command("--run", str(tmp_path), "--interval", "0.5").exit_code == 0
    assert (started[0].interval_s, started[0].prometheus.url) == (0.5, None)


def test_unknown_setting_is_rejected_with_its_path(tmp_path: Path) -> None:
    config = tmp_path / "controller.yaml"
    config.write_text("lease: {name: mine}")
    with pytest.raises(ConfigError, match=r"controller.yaml: lease: unknown key, expected one of alertmanager,"):
        load_settings(ControllerSettings, config, {"run": tmp_path})
