"""Redis addresses, their passwords and the client's options.

An address is ``redis[s]://[user[:password]@]host[:port][/database]``; an IPv6 host is in brackets. A password may
contain any character, as it is or percent-encoded. ``str()`` of an address never contains the password, and no error
shows the given text. A process takes the password from the first of these that is set:

1. an address that a command was given (``remember_password``);
2. ``REELWAY_ONLINE_STORE``, if it names the same server, database and user;
3. ``REDIS_PASSWORD``;
4. the file named by ``REDIS_PASSWORD_FILE``, which is read again for every new connection.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

from reelway.platform.errors import ConfigError
from reelway.platform.tls import TlsSettings

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

ONLINE_STORE_VARIABLE: Final = "REELWAY_ONLINE_STORE"
"""``sqlite`` (default) or an address, read when a run's ``feature_store.yaml`` is written."""
PASSWORD_VARIABLE: Final = "REDIS_PASSWORD"
PASSWORD_FILE_VARIABLE: Final = "REDIS_PASSWORD_FILE"
TLS_PREFIX: Final = "REELWAY_REDIS"
"""Prefix of ``_CA_FILE``, ``_CERT_FILE`` and ``_KEY_FILE``, which apply to ``rediss://``."""
DEFAULT_PORT: Final = 6379
_TIMEOUT_S: Final = 0.5
_GIVEN: Final[dict[RedisAddress, str]] = {}
_SERVER: Final = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>\d{1,5}))?(?:/(?P<database>\d{0,5}))?"
)
_EXPECTED: Final = "expected redis://[user[:password]@]host[:port][/database] (rediss:// with TLS; IPv6 in brackets: redis://[::1]:6379)"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A server, one of its databases, and optionally who connects."""

    host: str
    port: int = DEFAULT_PORT
    database: int = 0
    username: str = ""
    tls: bool = False
    password: str | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{quote(self.username, safe='')}@" if self.username else ""
        return f"{'rediss' if self.tls else 'redis'}://{user}{host}:{self.port}/{self.database}"


def parse_redis_address(text: str) -> RedisAddress:
    """Parses an address.

    Raises:
        ConfigError: if the text is no address. The message does not contain the text, which may contain a password.
    """
    scheme, separator, rest = text.strip().partition("://")
    if not separator or scheme not in ("redis", "rediss"):
        raise ConfigError(f"online store: saw another kind of address, {_EXPECTED}, or sqlite")
    credentials, _, server = rest.rpartition("@")  # a password may contain an @
    match = _SERVER.fullmatch(server)
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65_536 or not _is_ipv6(match["ipv6"]):
        raise ConfigError(
            f"online store: saw a {scheme}:// address with an invalid host, port or database, {_EXPECTED}"
        )
    username, colon, password = credentials.partition(":")
    return RedisAddress(
        host=match["ipv6"] or match["host"],
        port=port,
        database=int(match["database"] or 0),
        username=unquote(username),
        tls=scheme == "rediss",
        password=unquote(password) if colon else None,
    )


def without_password(online_store: str) -> str:
    """Returns an online store's address as it may be written to a file: ``sqlite``, or the address of a Redis.

    Raises:
        ConfigError: if the address is invalid.
    """
    return online_store if online_store == "sqlite" else str(parse_redis_address(online_store))


def remember_password(online_store: str) -> None:
    """Keeps an address's password in the memory of this process, for connections to the same address.

    Raises:
        ConfigError: if the address is invalid.
    """
    if online_store != "sqlite" and (address := parse_redis_address(online_store)).password is not None:
        _GIVEN[address] = address.password


def client_options(address: RedisAddress) -> dict[str, Any]:
    """Returns the arguments of ``redis.Redis`` for an address, with credentials and certificates of the environment.

    Raises:
        ConfigError: if a certificate cannot be read, or is set for an address without TLS.
    """
    # Reading a viewer's row may take at most half a second. After that the request falls back to an answer without
    # the row. redis-py's default, three retries with increasing delays, could delay a request by eight seconds.
    options: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "db": address.database,
        "socket_timeout": _TIMEOUT_S,
        "socket_connect_timeout": _TIMEOUT_S,
        "retry": None,
        "credential_provider": _credentials(address),
    }
    tls = TlsSettings.from_environment(TLS_PREFIX)
    if not address.tls:
        if tls.files:
            raise ConfigError(
                f"Redis {address}: saw {TLS_PREFIX}_CA_FILE or {TLS_PREFIX}_CERT_FILE with an address without TLS; use "
                "rediss://"
            )
        return options
    tls.client_context(f"Redis {address}")  # names a file that cannot be used
    options |= {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
    named = {"ssl_ca_certs": tls.ca_file, "ssl_certfile": tls.cert_file, "ssl_keyfile": tls.key_file}
    return options | {name: str(path) for name, path in named.items() if path is not None}


def redis_password(address: RedisAddress) -> str | None:
    """Returns the password for an address (see the module docstring), None if there is none.

    Raises:
        OSError: if the password file cannot be read.
        ValueError: if it is not UTF-8.
    """
    if address in _GIVEN:
        return _GIVEN[address]
    named = os.environ.get(ONLINE_STORE_VARIABLE) or "sqlite"
    if named != "sqlite" and (configured := parse_redis_address(named)) == address and configured.password is not None:
        return configured.password
    if password := os.environ.get(PASSWORD_VARIABLE):
        return _without_line_end(password)
    if path := os.environ.get(PASSWORD_FILE_VARIABLE):
        return _without_line_end(Path(path).read_bytes().decode())
    return None


def _credentials(address: RedisAddress) -> CredentialProvider | None:
    """Returns the object from which redis-py takes user and password for each connection; None if neither is set."""
    from redis.credentials import CredentialProvider
    from redis.exceptions import AuthenticationError

    class EnvironmentCredentials(CredentialProvider):
        def get_credentials(self) -> tuple[str] | tuple[str, str]:
            try:
                password = redis_password(address) or ""
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or "it is not UTF-8"
                path = os.environ.get(PASSWORD_FILE_VARIABLE)
                raise AuthenticationError(f"{path}: cannot read the password of {address}: {problem}") from error
            return (address.username, password) if address.username else (password,)

    configured = PASSWORD_FILE_VARIABLE in os.environ or redis_password(address) or address.username
    return EnvironmentCredentials() if configured else None


def _is_ipv6(text: str | None) -> bool:
    if text is None:
        return True
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _without_line_end(text: str) -> str:
    """Removes one line end, which an editor or ``echo`` adds to a file."""
    return text.removesuffix("\n").removesuffix("\r")
