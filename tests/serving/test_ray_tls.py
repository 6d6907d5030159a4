"""TLS between Ray's processes with the certificate that a pod of the chart issues for itself."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.util
from tests.support.certificates import CertificateAuthority

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PROGRAM = Path(__file__).parents[2] / "charts" / "reelway" / "files" / "programs" / "issue_ray_certificate.py"
ADDRESS = ray.util.get_node_ip_address()
"""Ray replaces a loopback address by this one."""
DRIVER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.get(ray.remote(lambda: "ran").remote(), timeout=60))
"""


def ray_environment(folder: Path) -> dict[str, str]:
    """Issues a certificate as the init container does, and returns the variables that the chart sets."""
    authority = CertificateAuthority(folder / "ca")
    (folder / "ca" / "ca.key").rename(folder / "ca" / "tls.key")
    (folder / "ca" / "tls.crt").write_bytes(authority.ca.read_bytes())
    (folder / "pod").mkdir()
    command = [sys.executable, str(PROGRAM), str(folder / "ca"), str(folder / "pod"), "reelway"]
    subprocess.run(command, env={**os.environ, "POD_IP": ADDRESS}, check=True, timeout=60)
    names = {"SERVER_CERT": "tls.crt", "SERVER_KEY": "tls.key", "CA_CERT": "ca.crt"}
    return {"RAY_USE_TLS": "1", **{f"RAY_TLS_{name}": str(folder / "pod" / file) for name, file in names.items()}}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 48}
    return {**inherited, **ray_environment(tmp_path), **token, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[int]:
    """Runs a Ray head with TLS and yields the port of its control store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
    command += [f"--node-ip-address={ADDRESS}", f"--port={port}", "--include-dashboard=false"]
    # Ray's sockets need a short path.
    folder = tmp_path_factory.getbasetemp().parent / "r"
    process = subprocess.Popen(
        [*command, f"--temp-dir={folder}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_ray_talks_tls_with_the_issued_certificate(tmp_path: Path, environment: dict[str, str], head: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, f"{ADDRESS}:{head}"],
        env=environment, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "ran", done.stderr[-2000:]
    trusting = ssl.create_default_context(cafile=str(tmp_path / "pod" / "ca.crt"))
    trusting.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((ADDRESS, head), timeout=5) as plain,
        trusting.wrap_socket(plain, server_hostname=ADDRESS) as secured,
    ):
        subject = dict(pair for group in secured.getpeercert()["subject"] for pair in group)
        assert subject["commonName"] == "reelway-ray"
