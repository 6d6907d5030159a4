"""An API server without a node: etcd and kube-apiserver on loopback ports, for tests of what the server itself decides.

No controller and no kubelet runs: nothing is scheduled, and a deleted namespace stays in `Terminating`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import yaml
from tests.support.cluster.kubectl import NODE
from tests.support.infra.scripts import load_script

START_S: Final = 120.0
ADMIN_TOKEN: Final = "admin"


def missing_program() -> str | None:
    """Returns the name of a program that is needed and missing."""
    if shutil.which("etcd") is None:
        return "etcd (Debian package etcd-server)"
    if not (NODE / "bin" / "kube-apiserver").exists():
        return f"{NODE}/bin/kube-apiserver (`make cluster-tools`)"
    return None


@contextmanager
def bare_api_server(folder: Path) -> Iterator[Path]:
    """Yields the kubeconfig of an administrator. ``folder`` gets data, keys and logs."""
    etcd_port, peer_port, port = _free_port(), _free_port(), _free_port()
    pki = load_script("cluster/pki.py")
    pki.create_ca(folder)
    pki.issue_certificate(folder, "server", "kube-apiserver", (), ("127.0.0.1", "localhost"))
    (folder / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,1,"system:masters"\n')
    client, peer = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    with ExitStack() as stack:
        stack.enter_context(running_process(folder, "etcd", [
            "etcd", f"--data-dir={folder}/etcd", f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        ]))  # fmt: skip
        _wait_for(folder, "etcd", lambda: _answers(f"{client}/health"))
        stack.enter_context(running_process(folder, "kube-apiserver", [
            str(NODE / "bin" / "kube-apiserver"), f"--etcd-servers={client}", "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none", f"--secure-port={port}",
            f"--tls-cert-file={folder}/server.crt", f"--tls-private-key-file={folder}/server.key",
            "--authorization-mode=RBAC", f"--token-auth-file={folder}/tokens.csv",
            "--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount",
            f"--service-account-key-file={folder}/service-account.pub",
            f"--service-account-signing-key-file={folder}/service-account.key",
            "--service-account-issuer=https://kubernetes.default.svc",
        ]))  # fmt: skip
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(_kubeconfig(folder, port)))
        kubectl = [str(NODE / "bin" / "kubectl"), "--kubeconfig", str(kubeconfig), "get", "--raw", "/readyz"]
        _wait_for(folder, "kube-apiserver", lambda: not subprocess.run(kubectl, capture_output=True).returncode)
        yield kubeconfig


def _kubeconfig(folder: Path, port: int) -> dict[str, object]:
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(folder / "ca.crt")}
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "bare",
        "clusters": [{"name": "bare", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": ADMIN_TOKEN}}],
        "contexts": [{"name": "bare", "context": {"cluster": "bare", "user": "admin"}}],
    }  # fmt: skip


@contextmanager
def running_process(
    folder: Path, name: str, command: list[str], environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Runs a program for the block. Its output goes to ``name.log`` in the folder."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(folder: Path, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        assert time.monotonic() < deadline, f"{name}: not ready\n{(folder / f'{name}.log').read_text()[-3000:]}"
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
