"""A real Redis server for tests, started from the ``redis-server`` program."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.certificates import CertificateFiles

PASSWORDS = (
    "a,b=c",
    "a#b",
    'a"b',
    "a\\b",
    " a b ",
    "no",
    "null",
    "true",
    "12345",
    "1e5",
    "{a: b}",
    "- a",
    "é€",
    "p@/?:[w]",
)
"""Passwords that break a format if they are not quoted: lists, comments, URLs, YAML words, numbers."""


@contextmanager
def running_redis(
    folder: Path,
    *,
    password: str = "",
    host: str = "127.0.0.1",
    tls: CertificateFiles | None = None,
    client_ca: Path | None = None,
) -> Iterator[str]:
    """Runs a server without persistence and yields its address ``host:port``.

    Args:
        password: ``requirepass``; empty for none.
        host: loopback address that the server listens at; IPv6 without brackets.
        tls: accepts TLS connections alone, with this certificate.
        client_ca: demands client certificates of this CA.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on the PATH; `make system-packages` installs it")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    command = [binary, "--bind", host, "--save", "", "--dir", str(folder)]
    if password:
        command += ["--requirepass", password]
    if tls is None:
        command += ["--port", str(port)]
    else:
        command += ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(tls.cert)]
        command += ["--tls-key-file", str(tls.key), "--tls-auth-clients", "yes" if client_ca else "no"]
        command += ["--tls-ca-cert-file", str(client_ca or tls.cert)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((host, port), timeout=0.2).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "redis-server did not come up in ten seconds"
                time.sleep(0.02)
        yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    finally:
        server.terminate()
        server.wait(timeout=10)
