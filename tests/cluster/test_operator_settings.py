"""The operator's settings file: values, environment variables and the messages about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from reelway.platform.cli.main import build_app
from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.errors import ConfigError
from reelway.platform.settings import load_settings


def load(tmp_path: Path, document: object, **overrides: object) -> OperatorSettings:
    path = tmp_path / "settings.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return load_settings(OperatorSettings, path, overrides)


def message(tmp_path: Path, document: object) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, document)
    return str(error.value)


def test_file_sets_nested_values_over_the_defaults(tmp_path: Path) -> None:
    document = {"prometheus": {"url": "http://p:9090", "labels": {"cluster": "a"}}, "lease": {"name": "mine"}}
    settings = load(tmp_path, document, identity="operator-0")
    assert (settings.prometheus.url, settings.prometheus.labels) == ("http://p:9090", {"cluster": "a"})
    assert (settings.lease.name, settings.lease.duration_s, settings.identity) == ("mine", 10.0, "operator-0")
    assert (settings.webhook.host, settings.webhook.port) == ("*", 8080)


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path, "")
    assert settings.interval_s == 2.0
    assert settings.identity


def test_environment_replaces_single_values_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELWAY_OPERATOR_PROMETHEUS__URL", "http://other:9090")
    monkeypatch.setenv("REELWAY_OPERATOR_INTERVAL_S", "7")
    monkeypatch.setenv("REELWAY_OPERATOR_RAY__TRUSTED_HOSTS", '["10.0.0.9"]')
    settings = load(tmp_path, {"prometheus": {"url": "http://p:9090", "labels": {"cluster": "a"}}, "interval_s": 1})
    assert (settings.prometheus.url, settings.prometheus.labels) == ("http://other:9090", {"cluster": "a"})
    assert (settings.interval_s, settings.ray.trusted_hosts) == (7.0, ("10.0.0.9",))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"promtheus": {}}, "promtheus: unknown key, expected one of alertmanager, identity, interval_s, lease"),
        (
            {"prometheus": {"uri": "x"}},
            "prometheus.uri: unknown key, expected one of ca_file, cert_file, key_file, labels, server_name, "
            "token_file, url",
        ),
        ({"interval_s": "often"}, "interval_s: saw 'often', expected a valid number"),
        ({"interval_s": 0}, "interval_s: saw 0, expected greater than 0"),
        ({"webhook": {"port": 70000}}, "webhook.port: saw 70000, expected less than or equal to 65535"),
        (
            {"webhook": 8080},
            "webhook: saw 8080, expected a mapping with the keys cert_file, host, key_file, port, token_file",
        ),
        ({"prometheus": {"url": "prometheus:9090"}}, "prometheus.url: saw 'prometheus:9090', expected"),
        ({"prometheus": {"labels": {"a-b": "c"}}}, "prometheus.labels.a-b"),
        ({"ray": {"trusted_hosts": "10.0.0.9"}}, "ray.trusted_hosts: saw '10.0.0.9', expected a valid tuple"),
        ({"ray": {"internal_url": "http://{service}"}}, "no placeholders but {name} and {namespace}"),
        (["a"], "saw ['a'], expected a mapping of settings"),
        ("a: [", "not YAML"),
    ],
)
def test_mistakes_are_reported_with_path_value_and_expectation(tmp_path: Path, document: object, expected: str) -> None:
    text = message(tmp_path, document)
    assert text.startswith(str(tmp_path / "settings.yaml"))
    assert expected in text


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    assert len(message(tmp_path, {"interval_s": 0, "lease": {"duration_s": "x"}}).splitlines()) == 2


def test_wrong_environment_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELWAY_OPERATOR_LEASE__DURATION_S", "x")
    assert "REELWAY_OPERATOR_LEASE__DURATION_S: lease.duration_s: saw 'x'" in message(tmp_path, {})
    monkeypatch.delenv("REELWAY_OPERATOR_LEASE__DURATION_S")
    monkeypatch.setenv("REELWAY_OPERATOR_RAY__TRUSTED_HOSTS", "10.0.0.9")
    assert message(tmp_path, {}).startswith("REELWAY_OPERATOR_RAY__TRUSTED_HOSTS: ")


def test_wrong_files_fail_at_startup(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not a certificate")
    for group in ("prometheus", "alertmanager"):
        with pytest.raises(ConfigError, match=r"wrong\.pem"):
            load(tmp_path, {group: {"ca_file": str(wrong)}}).check_files()
    with pytest.raises(ConfigError, match="not a template of a ranker"):
        load(tmp_path, {"ranker_template": str(wrong)}).check_files()


def test_command_fails_without_its_settings_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(build_app(), ["operator", "--config", str(tmp_path / "absent.yaml")])
    assert isinstance(result.exception, ConfigError)
    assert "absent.yaml: cannot read the settings file" in str(result.exception)
