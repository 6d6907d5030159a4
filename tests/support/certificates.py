"""A certificate authority for tests, with the code that makes the certificates of the test node."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.support.infra.scripts import load_script

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class CertificateFiles(NamedTuple):
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path


class CertificateAuthority:
    """Issues certificates for servers and clients into a folder."""

    def __init__(self, folder: Path) -> None:
        self._pki = load_script("cluster/pki.py")
        self._folder = folder
        self._pki.create_ca(folder)
        self.ca = folder / "ca.crt"

    def issue(self, name: str, hosts: tuple[str, ...] = LOOPBACK) -> CertificateFiles:
        """Issues a certificate for both directions. A second one of the same name replaces the files."""
        files = CertificateFiles(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        for path in files:
            path.unlink(missing_ok=True)
        self._pki.issue_certificate(self._folder, name, name, hosts=hosts)
        return files
