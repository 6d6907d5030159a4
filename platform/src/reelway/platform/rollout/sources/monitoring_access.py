"""Access to a Prometheus and an Alertmanager that need a token or their own CA, and that other namespaces share.

The token is read on every request, because a mounted token is renewed. It is sent to the given URL only and does not
follow a redirect. The CA certificates are read once.
"""

from __future__ import annotations

import ssl
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from reelway.platform.errors import ConfigError, RolloutError


@dataclass(frozen=True)
class MonitoringAccess:
    """How to access one of the two. By default: no token, the system's certificates, no label filter.

    Raises:
        ConfigError: if ``ca_file`` cannot be read, or contains no certificates.
    """

    token_file: Path | None = None
    """File of the bearer token; None sends no token."""
    ca_file: Path | None = None
    """CA certificates in PEM format; None uses the system's."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that select this installation's series and alerts, for example ``{"namespace": "prod"}``."""

    def __post_init__(self) -> None:
        self._verify()  # fail at startup, not when the first rollout begins

    def client(self, timeout_s: float) -> httpx.Client:
        auth = _FileBearerAuth(self.token_file) if self.token_file else None
        return httpx.Client(timeout=timeout_s, trust_env=False, auth=auth, verify=self._verify())

    def _verify(self) -> ssl.SSLContext | bool:
        if self.ca_file is None:
            return True
        try:
            return ssl.create_default_context(cafile=str(self.ca_file))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{self.ca_file}: cannot load CA certificates ({error}); expected a file in PEM format"
            ) from error


class _FileBearerAuth(httpx.Auth):
    """Sends a bearer token. Raises RolloutError at the request if the file cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        try:
            token = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RolloutError(f"{self._path}: cannot read the token for {request.url.host}: {error}") from error
        if not token or not token.isascii() or not token.isprintable():
            raise RolloutError(f"{self._path}: no token for {request.url.host}, expected one line of printable ASCII")
        request.headers["Authorization"] = f"Bearer {token}"
        yield request
