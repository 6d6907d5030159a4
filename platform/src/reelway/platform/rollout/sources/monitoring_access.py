"""Access to a Prometheus and an Alertmanager that need credentials or their own CA, and that other namespaces share.

The token is read on every request, because a mounted token is renewed. It is sent to the given URL only and does not
follow a redirect. Certificates are read again when their files change.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from reelway.platform.errors import RolloutError
from reelway.platform.tls import RenewingTransport, TlsSettings


@dataclass(frozen=True)
class MonitoringAccess:
    """How to access one of the two. By default: no token, public CAs, no label filter.

    Raises:
        ConfigError: if a certificate file of ``tls`` cannot be read, or contains no certificates.
    """

    tls: TlsSettings = field(default_factory=TlsSettings)
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that select this installation's series and alerts, for example ``{"namespace": "prod"}``."""
    hop: str = "monitoring"
    """Name of the server in messages."""

    def __post_init__(self) -> None:
        self.tls.client_context(self.hop)  # fail at startup, not when the first rollout begins

    def client(self, timeout_s: float) -> httpx.Client:
        auth = _FileBearerAuth(self.tls.token_file) if self.tls.token_file else None
        transport = RenewingTransport(self.tls, self.hop)
        return httpx.Client(timeout=timeout_s, trust_env=False, auth=auth, transport=transport)


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
