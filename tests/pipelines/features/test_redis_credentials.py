"""The online store in a real Redis with odd passwords, on IPv6 and with TLS. No file holds a password."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml
from feast import FeatureStore
from tests.support.certificates import CertificateAuthority
from tests.support.dimensions import DIMENSIONS
from tests.support.redis_server import PASSWORDS, running_redis

from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
from reelway.platform.errors import ConfigError, FeatureError, ReelwayError
from reelway.platform.features.feast_store import CONFIG_FILE, open_feature_store
from reelway.platform.features.redis_address import (
    ONLINE_STORE_VARIABLE,
    PASSWORD_FILE_VARIABLE,
    PASSWORD_VARIABLE,
    TLS_PREFIX,
)
from reelway.platform.features.viewer_memory import open_viewer_memory
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

pytestmark = pytest.mark.redis
SECRET = """ p,#"'\\ ${HOME} no: [w@r/d]%?& """


@pytest.fixture
def run(built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A copy of the built run, in an environment without credentials."""
    for name in (ONLINE_STORE_VARIABLE, PASSWORD_VARIABLE, PASSWORD_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, copy.path)
    return copy


def client(store: FeatureStore) -> redis.Redis:
    """A new connection as Feast's store makes it."""
    online = type(store._get_provider().online_store)()
    return online._get_client(store.config.online_store)


def files_with(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("source", ["address", "variable", "file"])
def test_password_with_odd_characters_is_never_written(
    built, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis", password=SECRET, host="::1") as server:
        address = f"redis://{server}/1"
        if source == "address":
            address = f"redis://:{SECRET}@{server}/1"
        elif source == "variable":
            monkeypatch.setenv(PASSWORD_VARIABLE, SECRET)
        else:
            (tmp_path / "password").write_text(SECRET + "\n")
            monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(tmp_path / "password"))
        register_features(run.features, DIMENSIONS, address)
        assert materialise(run.features, built.until_s) == 40
        store = open_feature_store(run.features)
        memory = open_viewer_memory(store)
        memory.block(501, creators=[4])
        found = ViewerRowReader(store, memory=memory).read_viewer(501)
        assert found.row["region"] in ("eu", "us")
        assert found.memory.blocked_creators.tolist() == [4]
    for text in (SECRET, SECRET.strip(), "w@r/d"):
        assert files_with(run.path, text) == []


@pytest.mark.parametrize("password", PASSWORDS)
def test_each_password_connects(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis", password=password) as server:
        register_features(run.features, DIMENSIONS, f"redis://{server}")
        store = open_feature_store(run.features)
        with pytest.raises(redis.AuthenticationError), client(store) as anonymous:
            anonymous.ping()
        monkeypatch.setenv(PASSWORD_VARIABLE, password)
        with client(store) as authenticated:
            assert authenticated.ping()


def test_renewed_password_file_is_read_again(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "password").write_text("first")
    monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(tmp_path / "password"))
    with running_redis(tmp_path / "redis", password="first") as server:
        register_features(run.features, DIMENSIONS, f"redis://{server}")
        with client(open_feature_store(run.features)) as connected:
            connected.config_set("requirepass", "second")
            (tmp_path / "password").write_text("second")
            connected.connection_pool.disconnect()
            assert connected.ping()
            (tmp_path / "password").unlink()
            connected.connection_pool.disconnect()
            with pytest.raises(redis.AuthenticationError, match="password: cannot read the password of redis://"):
                connected.ping()


def test_wrong_password_is_not_shown(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis", password="right") as server:
        store = register_features(run.features, DIMENSIONS, f"redis://:hunter2@{server}/3")
        with pytest.raises(FeatureError, match=r"cannot read viewer-[0-9a-f]{12}") as caught:
            ViewerRowReader(store).read(500)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "broken",
    [
        {"online_store": {"type": "redis", "connection_string": "${REDIS_PASSWORD}", "client": "${REDIS_PASSWORD}"}},
        {"online_store": {"type": "redis", "connection_string": ["${REDIS_PASSWORD}"]}},
        {"project": ["${REDIS_PASSWORD}"]},
    ],
)
def test_invalid_store_config_is_rejected_without_values(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, broken: dict[str, object]
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, 'hunter2"')
    path = run.features / CONFIG_FILE
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | broken))
    with pytest.raises(FeatureError, match=r"cannot open the feature store: \S") as caught:
        open_feature_store(run.features)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_malformed_store_config_is_rejected_by_line(run: RunDirectory) -> None:
    (run.features / CONFIG_FILE).write_text('project: reelway\nonline_store: "hunter2\n')
    with pytest.raises(FeatureError, match=r"cannot read the file as YAML \(line \d\)") as caught:
        open_feature_store(run.features)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority(tmp_path / "certificates")


@pytest.fixture
def tls_server(tmp_path: Path, authority: CertificateAuthority) -> Iterator[str]:
    """A Redis that accepts TLS with client certificates alone."""
    (tmp_path / "redis").mkdir()
    server = authority.issue("redis")
    with running_redis(tmp_path / "redis", password="p", tls=server, client_ca=authority.ca) as address:
        yield address


def test_tls_server_is_used_with_a_client_certificate(
    run: RunDirectory, authority: CertificateAuthority, tls_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = authority.issue("client")
    monkeypatch.setenv(PASSWORD_VARIABLE, "p")
    monkeypatch.setenv(f"{TLS_PREFIX}_CA_FILE", str(authority.ca))
    register_features(run.features, DIMENSIONS, f"rediss://{tls_server}")
    store = open_feature_store(run.features)
    with client(store) as without_certificate, pytest.raises(redis.ConnectionError):
        without_certificate.ping()
    monkeypatch.setenv(f"{TLS_PREFIX}_CERT_FILE", str(files.cert))
    with pytest.raises(ConfigError, match="REELWAY_REDIS_KEY_FILE: saw one of them"):
        client(store)
    monkeypatch.setenv(f"{TLS_PREFIX}_KEY_FILE", str(files.key))
    with client(store) as connected:
        assert connected.ping()
        monkeypatch.setenv(f"{TLS_PREFIX}_CA_FILE", str(files.cert))
        with client(store) as distrusting, pytest.raises(redis.ConnectionError, match="certificate verify failed"):
            distrusting.ping()
        authority.issue("client")  # renewed: the next connection reads it
        connected.connection_pool.disconnect()
        assert connected.ping()


def test_certificate_of_another_host_is_rejected(
    run: RunDirectory, tmp_path: Path, authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis").mkdir()
    monkeypatch.setenv(f"{TLS_PREFIX}_CA_FILE", str(authority.ca))
    other = authority.issue("other", hosts=("redis.test",))
    with running_redis(tmp_path / "redis", tls=other) as server:
        register_features(run.features, DIMENSIONS, f"rediss://{server}")
        with (
            client(open_feature_store(run.features)) as connected,
            pytest.raises(redis.ConnectionError, match="IP address"),
        ):
            connected.ping()


@pytest.mark.parametrize(("content", "problem"), [(None, "No such file"), ("no PEM", "expected a file in PEM format")])
def test_unreadable_certificate_is_reported_with_hop_and_file(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, problem: str
) -> None:
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(f"{TLS_PREFIX}_CA_FILE", str(path))
    register_features(run.features, DIMENSIONS, "rediss://redis.test")
    with pytest.raises(ReelwayError, match=f"Redis rediss://redis.test:6379/0: {path}: .*{problem}"):
        open_viewer_memory(open_feature_store(run.features))
    register_features(run.features, DIMENSIONS, "redis://redis.test")
    with pytest.raises(ConfigError, match="address without TLS; use rediss://"):
        open_viewer_memory(open_feature_store(run.features))
