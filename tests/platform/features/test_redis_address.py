"""Redis addresses: what is parsed, what is shown, and where a password comes from."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.redis_server import PASSWORDS

from reelway.platform.errors import ConfigError
from reelway.platform.features.feast_store import online_store_config
from reelway.platform.features.redis_address import (
    ONLINE_STORE_VARIABLE,
    PASSWORD_FILE_VARIABLE,
    PASSWORD_VARIABLE,
    RedisAddress,
    client_options,
    parse_redis_address,
    redis_password,
    without_password,
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ONLINE_STORE_VARIABLE, PASSWORD_VARIABLE, PASSWORD_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("redis://host", RedisAddress("host"), "redis://host:6379/0"),
        ("redis://host:1/2", RedisAddress("host", 1, 2), "redis://host:1/2"),
        ("rediss://my_redis.example.org/", RedisAddress("my_redis.example.org", tls=True), None),
        ("redis://[::1]:6380/1", RedisAddress("::1", 6380, 1), "redis://[::1]:6380/1"),
        ("redis://user:secret@[fd00::5]", RedisAddress("fd00::5", username="user"), "redis://user@[fd00::5]:6379/0"),
        ("redis://a%40b@host", RedisAddress("host", username="a@b"), "redis://a%40b@host:6379/0"),
    ],
)
def test_address_is_parsed(text: str, expected: RedisAddress, shown: str | None) -> None:
    assert parse_redis_address(text) == expected
    assert shown is None or without_password(text) == shown
    assert parse_redis_address(str(expected)) == expected


@pytest.mark.parametrize("password", PASSWORDS)
def test_password_may_contain_any_character(password: str) -> None:
    for written in (password, quote(password, safe="")):
        address = parse_redis_address(f"redis://:{written}@[::1]:6379")
        assert address.password == password
        assert (address.host, address.port) == ("::1", 6379)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_encoded_password_is_never_shown(password: str) -> None:
    address = parse_redis_address(f"redis://:{quote(password, safe='')}@host:6379")
    assert address.password == password
    plain = RedisAddress("host")
    assert (str(address), repr(address)) == (str(plain), repr(plain))
    assert online_store_config(f"redis://:{quote(password, safe='')}@host") == online_store_config("redis://host")


@pytest.mark.parametrize(
    "text",
    [
        "redis://:hunter2@",
        "redis://:hunter2@host:0",
        "redis://:hunter2@host:65536",
        "redis://:hunter2@::1:6379",
        "redis://:hunter2@[1.2.3.4]",
        "redis://:hunter2@[::1",
        "redis://:hunter2@host?db=1",
        "redis://:hunter2@host/zero",
        "redis://:hunter2",
        "host:6379,password=hunter2",
        "valkey://:hunter2@host",
        "hunter2",
    ],
)
def test_invalid_address_is_rejected_without_its_text(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected redis://\[user\[:password\]@\]host") as caught:
        online_store_config(text)
    assert "hunter2" not in str(caught.value)


def test_password_comes_from_address_variable_or_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = parse_redis_address("redis://host/1")
    assert redis_password(address) is None
    assert client_options(address)["credential_provider"] is None
    (tmp_path / "password").write_text("of the file \n")
    monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(tmp_path / "password"))
    assert redis_password(address) == "of the file "
    monkeypatch.setenv(PASSWORD_VARIABLE, "of the variable")
    assert redis_password(address) == "of the variable"
    monkeypatch.setenv(ONLINE_STORE_VARIABLE, "redis://:of the address@host:6379/1")
    assert redis_password(address) == "of the address"
    assert redis_password(parse_redis_address("redis://other/1")) == "of the variable"
