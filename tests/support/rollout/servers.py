"""Debian's Prometheus and Alertmanager on free ports, each in a temporary folder."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import yaml
from tests.support.certificates import CertificateFiles

from reelway.platform.rollout.rules import canary_rules, scrape_example

T = TypeVar("T")
SCRAPE_S = 0.5


def eventually(call: Callable[[], T], *, within_s: float = 15.0, every_s: float = 0.05) -> T:
    """Waits for the first true value of ``call``; fails with the last value."""
    deadline = time.monotonic() + within_s
    while not (last := call()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s; the last answer was {last!r}"
        time.sleep(every_s)
    return last


@dataclass(frozen=True)
class WebTls:
    """TLS of a server's web port, which demands a client certificate of the same CA."""

    server: CertificateFiles
    client: CertificateFiles
    ca: Path

    def write(self, folder: Path) -> list[str]:
        """Writes the file for ``--web.config.file`` and returns the argument."""
        tls = {
            "cert_file": str(self.server.cert), "key_file": str(self.server.key),
            "client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": str(self.ca),
        }  # fmt: skip
        (folder / "web.yaml").write_text(yaml.safe_dump({"tls_server_config": tls}))
        return ["--web.config.file=web.yaml"]

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(*self.client)
        return context


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Suspends the server: it neither answers nor closes connections."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def scrape(self, *addresses: str) -> None:
        """Sets the targets of both jobs; Prometheus reads them every five seconds."""
        aside = self.folder / "targets.new"
        aside.write_text(_targets(addresses))
        aside.replace(self.folder / "targets.json")


@contextmanager
def prometheus(folder: Path, *targets: str, alertmanager: str, tls: WebTls | None = None) -> Iterator[Server]:
    """Prometheus with the shipped example configuration and rules, a short interval and targets from a file.

    Args:
        targets: addresses; ``NAMESPACE/ADDRESS`` adds a namespace label to the series.
    """
    config: dict[str, Any] = yaml.safe_load(scrape_example())
    config["global"] = {"scrape_interval": f"{SCRAPE_S * 1000:.0f}ms", "evaluation_interval": "500ms"}
    for job in config["scrape_configs"]:
        del job["static_configs"]
        job["file_sd_configs"] = [{"files": ["targets.json"]}]
    config["rule_files"] = ["canary.rules.yaml"]
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    (folder / "canary.rules.yaml").write_text(canary_rules())
    (folder / "targets.json").write_text(_targets(targets))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config.file=prometheus.yaml", "--storage.tsdb.path=data", "--log.level=warn"]
    with _server("prometheus", arguments, folder, free_address(), tls) as server:
        yield server


@contextmanager
def alertmanager(folder: Path, address: str, webhook: str, token: str, tls: WebTls | None = None) -> Iterator[Server]:
    """Alertmanager that delivers at once to a webhook, with a bearer token; ``tls`` contains the webhook's CA, too."""
    client: dict[str, Any] = {"authorization": {"type": "Bearer", "credentials": token}}
    if tls:
        client["tls_config"] = {"ca_file": str(tls.ca)}
    config = {
        "route": {"receiver": "rollout", "group_by": ["release"], "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "rollout", "webhook_configs": [{"url": webhook, "http_config": client}]}],
    }
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config.file=alertmanager.yaml", "--storage.path=data", "--cluster.listen-address="]
    with _server("prometheus-alertmanager", arguments, folder, address, tls) as server:
        yield server


def _targets(addresses: Iterable[str]) -> str:
    groups = []
    for address in addresses:
        namespace, _, bare = address.rpartition("/")
        groups.append({"targets": [bare], "labels": {"namespace": namespace} if namespace else {}})
    return json.dumps(groups)


def free_address() -> str:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def _server(
    program: str, arguments: list[str], folder: Path, address: str, tls: WebTls | None = None
) -> Iterator[Server]:
    binary = shutil.which(program)
    if binary is None:
        pytest.skip(f"no {program} on the PATH; `make system-packages` installs it")
    arguments = [*arguments, *(tls.write(folder) if tls else ())]
    url = f"{'https' if tls else 'http'}://{address}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, *arguments, f"--web.listen-address={address}"], cwd=folder, stderr=log)
    try:

        def ready() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                verify = tls.context() if tls else True
                return httpx.get(f"{url}/-/ready", timeout=1, trust_env=False, verify=verify).is_success
            except httpx.TransportError:
                return False

        eventually(ready)
        yield Server(url, process, folder)
    finally:
        process.terminate()
        process.wait(timeout=10)
