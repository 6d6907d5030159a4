"""TLS settings of one connection: CA, client or server certificate, and bearer token, all of them files.

Certificates are renewed while a process runs. HTTP clients and servers therefore read changed files again. Redis'
client reads them for every new connection. Kafka's client reads them when the process starts.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from reelway.platform.errors import ConfigError

_LABEL: Final = "[a-z]([-a-z0-9]*[a-z0-9])?"
_CLUSTER_NAME: Final = re.compile(rf"{_LABEL}|({_LABEL}\.){{2,3}}svc(\.cluster\.local)?")
"""A Service, with or without its namespace; three labels before ``svc`` are a pod of a headless Service."""
Stamp = tuple[tuple[str, int, int, int], ...]
HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]*$")]


class TlsSettings(BaseModel):
    """How a client proves itself and verifies a server. By default: the public CAs, no certificate, no token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_file: Path | None = Field(default=None, description="bearer token, read on every request")
    ca_file: Path | None = Field(default=None, description="PEM certificates to verify the server; default: public CAs")
    cert_file: Path | None = Field(default=None, description="PEM client certificate; needs key_file")
    key_file: Path | None = Field(default=None, description="PEM private key of cert_file")
    server_name: HostName = Field(default="", description="name in the server's certificate; default: the URL's host")

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            present, missing = ("cert_file", "key_file") if self.cert_file else ("key_file", "cert_file")
            raise ValueError(f"saw {present} without {missing}, expected both or neither")
        return self

    @classmethod
    def from_environment(cls, prefix: str) -> TlsSettings:
        """Reads the paths in ``{prefix}_CA_FILE``, ``{prefix}_CERT_FILE`` and ``{prefix}_KEY_FILE``.

        Raises:
            ConfigError: if only one of certificate and key is set.
        """
        names = [f"{prefix}_{file}" for file in ("CA_FILE", "CERT_FILE", "KEY_FILE")]
        ca_file, cert_file, key_file = (Path(path) if (path := os.environ.get(name)) else None for name in names)
        if bool(cert_file) != bool(key_file):
            raise ConfigError(f"{names[1]} and {names[2]}: saw one of them, expected both or neither")
        return cls(ca_file=ca_file, cert_file=cert_file, key_file=key_file)

    @property
    def files(self) -> tuple[Path, ...]:
        """The certificate and key files that are set."""
        return tuple(path for path in (self.ca_file, self.cert_file, self.key_file) if path is not None)

    def client_context(self, hop: str) -> ssl.SSLContext:
        """Reads the files.

        Args:
            hop: the connection's name in error messages.

        Raises:
            ConfigError: if a file cannot be read or is not PEM, or key and certificate do not belong together.
        """
        if self.ca_file is None:
            context = httpx.create_ssl_context(trust_env=False)
        else:
            try:
                context = ssl.create_default_context(cafile=str(self.ca_file))
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(
                    f"{hop}: {self.ca_file}: cannot load CA certificates ({error}); expected a file in PEM format"
                ) from error
        if self.cert_file is not None and self.key_file is not None:
            load_certificate(context, self.cert_file, self.key_file, hop)
        return context


@dataclass(frozen=True)
class ServerCertificate:
    """Certificate and key of a server, which new connections use as soon as the files change."""

    cert_file: Path
    key_file: Path

    def context(self, hop: str, on_error: Callable[[ConfigError], object]) -> ssl.SSLContext:
        """Returns the server's TLS context.

        Args:
            hop: the server's name in error messages.
            on_error: called if changed files cannot be read; connections keep the former certificate.

        Raises:
            ConfigError: if the files cannot be read now.
        """
        return _RenewedContext(self, hop, on_error).current


class _RenewedContext:
    """Reads the files again at a handshake that follows a change. Handshakes run in one thread, the event loop's."""

    def __init__(self, certificate: ServerCertificate, hop: str, on_error: Callable[[ConfigError], object]) -> None:
        self._certificate, self._hop, self._on_error = certificate, hop, on_error
        self._stamp = file_stamp((certificate.cert_file, certificate.key_file))
        self.current = self._read()

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        load_certificate(context, self._certificate.cert_file, self._certificate.key_file, self._hop)
        context.sni_callback = self._renew
        return context

    def _renew(self, connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
        stamp = file_stamp((self._certificate.cert_file, self._certificate.key_file))
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.current = self._read()
            except ConfigError as error:
                self._on_error(error)
        connection.context = self.current


class RenewingTransport(httpx.BaseTransport):
    """An HTTP transport that connects again when a certificate file has changed.

    A failed read raises ``httpx.ConnectError``, like a server that cannot be reached.
    """

    def __init__(self, tls: TlsSettings, hop: str) -> None:
        """Reads the files once, so that a wrong file fails at startup.

        Raises:
            ConfigError: see ``TlsSettings.client_context``.
        """
        self._tls, self._hop = tls, hop
        self._stamp = file_stamp(tls.files)
        self._transport = httpx.HTTPTransport(verify=tls.client_context(hop), trust_env=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        stamp = file_stamp(self._tls.files)
        if stamp != self._stamp:
            try:
                renewed = httpx.HTTPTransport(verify=self._tls.client_context(self._hop), trust_env=False)
            except ConfigError as error:
                raise httpx.ConnectError(str(error), request=request) from error
            self._transport.close()
            self._transport, self._stamp = renewed, stamp
        if self._tls.server_name:
            request.extensions = {**request.extensions, "sni_hostname": self._tls.server_name}
        return self._transport.handle_request(request)

    def close(self) -> None:
        self._transport.close()


def load_certificate(context: ssl.SSLContext, cert_file: Path, key_file: Path, hop: str) -> None:
    """Loads a certificate with its key into a context.

    Raises:
        ConfigError: if a file cannot be read or is not PEM, or key and certificate do not belong together.
    """
    for path in (cert_file, key_file):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{hop}: {path}: cannot read the file: {error.strerror or error}") from error
    try:
        # A key with a passphrase would ask for it at the terminal.
        context.load_cert_chain(cert_file, key_file, password="")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{hop}: {cert_file} with {key_file}: cannot load the certificate ({error}); expected a certificate and "
            "its own key, unencrypted, in PEM format"
        ) from error


def file_stamp(paths: Iterable[Path]) -> Stamp:
    """Returns path, inode, size and modification time of each file, which change with it; zeros for a missing file."""
    stamps = []
    for path in paths:
        try:
            found = path.stat()
            stamps.append((str(path), found.st_ino, found.st_size, found.st_mtime_ns))
        except OSError:
            stamps.append((str(path), 0, 0, 0))
    return tuple(stamps)


def is_local_name(host: str) -> bool:
    """Whether a host is on the machine or in the cluster: loopback, one label, ``*.svc`` or ``*.svc.cluster.local``."""
    name = host.strip("[]").rstrip(".").lower()
    if name in ("::1", "localhost") or (name.startswith("127.") and name.replace(".", "").isdigit()):
        return True
    return _CLUSTER_NAME.fullmatch(name) is not None


def check_token_is_encrypted(url: str, token_file: Path | None) -> None:
    """Rejects a URL that would carry a bearer token in clear text out of the cluster.

    Raises:
        ValueError: if a token is set, the URL is ``http://`` and its host is not local (``is_local_name``).
    """
    parsed = httpx.URL(url)
    if token_file is not None and parsed.scheme == "http" and not is_local_name(parsed.host):
        raise ValueError(
            f"saw http://{parsed.host} with the bearer token {token_file}, expected https://, because the token would "
            "leave the cluster in clear text; a service of the cluster is NAME.NAMESPACE.svc"
        )
