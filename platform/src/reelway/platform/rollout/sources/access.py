"""Why: a platform's Prometheus and Alertmanager are behind a token and a certificate of its own, and serve others too.

How both are asked, and which of what they hold is ours. The token is read at each use, since a mounted one is renewed;
it is sent to the URL that was given and never follows a redirect. The certificate is read once.
"""

from __future__ import annotations

import ssl
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from reelway.platform.errors import ConfigError, RolloutError


@dataclass(frozen=True)
class Access:
    """How one of the two is asked. The default is one on this machine, which is ours alone.

    Raises:
        ConfigError: ``ca_file`` cannot be read, or holds no certificates.
    """

    token_file: Path | None = None
    """Bearer token; None sends none."""
    ca_file: Path | None = None
    """Certificates that its own is checked with; None takes the system's."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What tells our series and alerts from others' in the same place, ``{"namespace": "prod"}``; empty: all are."""

    def __post_init__(self) -> None:
        self._verify()  # said at the start, not when the first rollout begins

    def client(self, timeout_s: float) -> httpx.Client:
        """A client for it."""
        auth = _TokenInFile(self.token_file) if self.token_file else None
        return httpx.Client(timeout=timeout_s, trust_env=False, auth=auth, verify=self._verify())

    def _verify(self) -> ssl.SSLContext | bool:
        if self.ca_file is None:
            return True
        try:
            return ssl.create_default_context(cafile=str(self.ca_file))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{self.ca_file}: not certificates to check a server with ({error}); expected a file in PEM format"
            ) from error


class _TokenInFile(httpx.Auth):
    """Raises RolloutError at the request: the token cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        try:
            token = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RolloutError(f"{self._path}: cannot read the token for {request.url.host}: {error}") from error
        if not token or not token.isascii() or not token.isprintable():
            raise RolloutError(f"{self._path}: no token for {request.url.host}, expected a line of printable ASCII")
        request.headers["Authorization"] = f"Bearer {token}"
        yield request
