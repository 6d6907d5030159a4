"""``reelway viewer-key`` and ``reelway viewer-token``, and traffic that needs them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from reelway.pipelines.commands import traffic
from reelway.platform.cli import viewer_commands
from reelway.platform.errors import ConfigError
from reelway.platform.release.signing import create_keys, load_public_keys
from reelway.platform.rollout.traffic.access_options import JwtOptions
from reelway.serving.access.access_file import read_access
from reelway.serving.access.assertions import JwtVerifier


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer()
    viewer_commands.register(application)
    return application


def test_printed_token_proves_the_viewer(app: typer.Typer, tmp_path: Path) -> None:
    key = tmp_path / "viewers.pem"
    assert CliRunner().invoke(app, ["viewer-key", "--key", str(key)]).exit_code == 0
    options = ["viewer-token", "--viewer", "123", "--key", str(key), "--audience", "reelway", "--issuer", "me"]
    token = CliRunner().invoke(app, options).stdout.strip()
    verified = JwtOptions(keys_file=tmp_path / "viewers-public.pem", audience="reelway", issuer="me")
    headers = [(b"authorization", b"Bearer " + token.encode())]
    assert asyncio.run(JwtVerifier(verified, lambda: None).verify(headers)) == 123
    again = CliRunner().invoke(app, ["viewer-key", "--key", str(key)])
    assert isinstance(again.exception, ConfigError)


def test_viewer_key_does_not_sign_releases(app: typer.Typer, tmp_path: Path) -> None:
    """Also if it is made in the folder of the keys that releases are verified with."""
    create_keys(tmp_path)
    assert len(load_public_keys(tmp_path)) == 1
    assert CliRunner().invoke(app, ["viewer-key", "--key", str(tmp_path / "viewers.pem")]).exit_code == 0
    assert (tmp_path / "viewers-public.pem").exists()
    assert len(load_public_keys(tmp_path)) == 1


def test_traffic_names_the_audience_that_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--viewer-key without --audience"):
        traffic._signer(tmp_path / "viewers.pem", None, None)
    with pytest.raises(ConfigError, match=r"cannot read the viewer key: .*make one with `reelway viewer-key`"):
        traffic._signer(tmp_path / "viewers.pem", "reelway", None)


def test_paths_of_an_access_file_are_relative_to_its_folder(app: typer.Typer, tmp_path: Path) -> None:
    CliRunner().invoke(app, ["viewer-key", "--key", str(tmp_path / "viewers.pem")])
    file = tmp_path / "auth.yaml"
    file.write_text("mode: jwt\njwt: {audience: reelway, keys_file: viewers-public.pem}\n")
    access = read_access(file)
    assert access.jwt is not None
    assert access.jwt.keys_file == tmp_path / "viewers-public.pem"
    assert read_access(None).mode == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: jwt\njwt: {audience: reelway, keys_file: missing.pem}\n", r"missing\.pem: cannot read the keys"),
        ("mode: jwt\njwt: {audience: reelway, keys_file: auth.yaml}\n", "neither a key set"),
        ("mode: gateway\ngateway: {keys_file: missing.keys}\n", r"missing\.keys: cannot read the keys"),
        ("mode: jwt\n", "mode is 'jwt'"),
        ("mode: basic\n", "mode"),
        ("per_viewer: {per_second: 5}\n", "burst"),
    ],
)
def test_unusable_access_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "auth.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_access(file)
