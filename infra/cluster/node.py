"""Starts and removes the node. Both operations are idempotent and may be interrupted at any point.

``up`` polls conditions with deadlines. If one is missed, the error contains the end of the process's log. ``down``
stops only the processes that are recorded here, and removes every mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import layout as at
from build import build_tools, module_folder
from configuration import (
    api_server_command,
    controller_manager_command,
    etcd_command,
    kubelet_command,
    scheduler_command,
    write_cni,
    write_containerd,
    write_coredns,
    write_json,
    write_kube_proxy,
    write_kubeconfig,
    write_resolver,
)
from firewall import node_chains, remove_chains
from layout import NodePaths
from pause import write_pause_image
from pki import create_ca, issue_certificate
from processes import ProcessTable

LogFunction = Callable[[str], None]
_PACKAGES = {
    "etcd": "etcd-server", "containerd": "containerd", "runc": "runc", "conntrack": "conntrack",
    "iptables": "iptables", "socat": "socat", "ip": "iproute2",
}  # fmt: skip
_CLIENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "admin": ("reelway-admin", ("system:masters",)),
    "controller-manager": ("system:kube-controller-manager", ()),
    "scheduler": ("system:kube-scheduler", ()),
    "kube-proxy": ("system:kube-proxy", ()),
    "kubelet": (f"system:node:{at.NODE}", ("system:nodes",)),
    "coredns": ("reelway-coredns", ("system:masters",)),
}


class NodeError(Exception):
    """Raised if the node cannot be started; the message states the condition and the end of the process's log."""


class Node:
    """One node in one folder."""

    def __init__(self, layout: NodePaths, say: LogFunction) -> None:
        self._layout, self._print_progress = layout, say
        self._processes = ProcessTable(layout)

    def up(self) -> None:
        """Starts every part that does not run, until the node is Ready with cluster DNS."""
        self._check_prerequisites()
        build_tools(self._layout, self._print_progress)
        began = time.monotonic()
        self._credentials()
        self._network()
        self._control_plane()
        self._runtime()
        self._services()
        self._print_progress(f"node {at.NODE} is Ready with cluster DNS after {time.monotonic() - began:.0f} s")
        self._print_progress(f"export KUBECONFIG={self._layout.admin_kubeconfig} PATH={self._layout.bin}:$PATH")

    def install_kuberay(self, namespace: str = "kuberay-system") -> None:
        """Installs KubeRay's CRDs and starts its operator as a process that watches all namespaces."""
        crds = module_folder("kuberay", "github.com/ray-project/kuberay/ray-operator") / "config" / "crd" / "bases"
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
        self.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(crds))
        if not self._exists("namespace", namespace):
            self.kubectl("create", "namespace", namespace)
        self._processes.start(
            "kuberay",
            self._with_cluster_resolver(
                str(self._layout.bin / "ray-operator"),
                "--metrics-addr=127.0.0.1:8383",
                "--health-probe-bind-address=127.0.0.1:8384",
                "--enable-leader-election=false",
            ),
            {"KUBECONFIG": str(self._layout.admin_kubeconfig), "POD_NAMESPACE": namespace},
        )
        self._wait_for("the KubeRay operator", lambda: _is_reachable("http://127.0.0.1:8384/healthz"), "kuberay")

    def import_image(self, archive: Path) -> None:
        """Imports an image archive into containerd."""
        self._ctr("images", "import", "--all-platforms", str(archive))

    def down(self) -> None:
        """Stops and removes everything that ``up`` created. Built programs are kept."""
        if not self._layout.state.exists():
            self._print_progress("no node is running")
            return
        self._processes.stop("kuberay")
        for name in ("controller-manager", "scheduler"):
            self._processes.stop(name)
        self._stop_pods()
        for name in reversed(self._processes.names()):
            self._processes.stop(name)
        self._remove_network()
        self._unmount()
        self._remove_cgroups()
        self._remove_links()
        shutil.rmtree(self._layout.state)
        self._print_progress("node removed; built programs are kept in " + str(self._layout.bin))

    def status(self) -> dict[str, bool]:
        """Returns whether each process runs, by name."""
        return {name: self._processes.running(name) for name in self._processes.names()}

    def kubectl(self, *args: str) -> str:
        """Runs kubectl and returns its output. Raises NodeError with its error message."""
        command = [str(self._layout.bin / "kubectl"), f"--kubeconfig={self._layout.admin_kubeconfig}", *args]
        return _run(command)

    # Up.

    def _with_cluster_resolver(self, *command: str) -> list[str]:
        """Wraps a command in a mount namespace in which the pods' resolv.conf replaces the machine's."""
        resolver = write_resolver(self._layout)
        mount_resolver = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount_resolver, str(resolver), *command]

    def _check_prerequisites(self) -> None:
        if os.geteuid() != 0:
            raise NodeError(
                "node: mounts, namespaces and a bridge require root; run as root, or set KUBECONFIG to a cluster"
            )
        if missing := [package for program, package in _PACKAGES.items() if shutil.which(program) is None]:
            raise NodeError(f"node: programs are missing; install the Debian packages {' '.join(missing)}")
        if not Path("/usr/lib/cni/bridge").exists():
            raise NodeError("node: /usr/lib/cni has no CNI plugins; install the package containernetworking-plugins")

    def _credentials(self) -> None:
        pki = self._layout.pki
        create_ca(pki)
        api_names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            f"kubernetes.default.svc.{at.DOMAIN}",
        ]
        issue_certificate(pki, "api-server", "kube-apiserver", ("system:masters",),
              (*api_names, at.NODE_IP, at.API_SERVICE_IP, "127.0.0.1"))  # fmt: skip
        issue_certificate(pki, "kubelet-server", at.NODE, (), (at.NODE, at.NODE_IP))
        issue_certificate(pki, "front-proxy", "front-proxy")
        for file, (name, groups) in _CLIENTS.items():
            issue_certificate(pki, file, name, groups)
            write_kubeconfig(self._layout, self._layout.kubeconfig(file), file)
        write_kubeconfig(self._layout, self._layout.admin_kubeconfig, "admin")

    def _network(self) -> None:
        if shutil.which("modprobe"):
            _run(["modprobe", "-q", "br_netfilter"], check=False)
        for setting in ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"):
            path = Path("/proc/sys") / setting
            if path.exists() and path.read_text().strip() != "1":
                (self._layout.state / f"was.{setting.replace('/', '.')}").write_text(path.read_text())
                path.write_text("1")
        if not Path("/sys/class/net", at.BRIDGE).exists():
            _run(["ip", "link", "add", at.BRIDGE, "type", "bridge"])
            _run(["ip", "addr", "add", f"{at.NODE_IP}/24", "dev", at.BRIDGE])
            _run(["ip", "link", "set", at.BRIDGE, "up"])
        chains = self._layout.state / "chains-before"
        if not chains.exists():
            chains.write_text("\n".join(node_chains()))
        write_cni(self._layout)

    def _control_plane(self) -> None:
        self._processes.start("etcd", etcd_command(self._layout))
        self._wait_for("etcd", lambda: _is_reachable(f"http://127.0.0.1:{at.ETCD_PORT}/health"), "etcd")
        self._processes.start("api-server", api_server_command(self._layout))
        self._wait_for(
            "the API server", lambda: self._kubectl_or_empty("get", "--raw", "/readyz") == "ok", "api-server"
        )
        self._processes.start("controller-manager", controller_manager_command(self._layout))
        self._processes.start("scheduler", scheduler_command(self._layout))

    def _runtime(self) -> None:
        config = write_containerd(self._layout)
        self._processes.start("containerd", ["containerd", "--config", str(config)])
        self._wait_for("containerd", lambda: bool(self._ctr("version", check=False)), "containerd")
        if at.PAUSE_IMAGE not in self._ctr("images", "ls", "-q").split():
            archive = self._layout.state / "pause.tar"
            write_pause_image(archive)
            self.import_image(archive)
        self._processes.start("kubelet", kubelet_command(self._layout))
        self._wait_for("node Ready", self._ready, "kubelet")

    def _services(self) -> None:
        proxy = write_kube_proxy(self._layout)
        self._processes.start("kube-proxy", [str(self._layout.bin / "kube-proxy"), f"--config={proxy}"])
        self._processes.start("coredns", [str(self._layout.bin / "coredns"), "-conf", str(write_coredns(self._layout))])
        self._publish_dns()
        self._wait_for("cluster DNS", lambda: _is_reachable("http://127.0.0.1:8181/ready"), "coredns")
        account = ("serviceaccount", "default", "-n", "default")
        self._wait_for("the default service account", lambda: self._exists(*account), "controller-manager")

    def _publish_dns(self) -> None:
        """Creates the Service of CoreDNS. CoreDNS is a process, so the endpoint is the node and no selector exists."""
        ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
        meta = {"name": "kube-dns", "namespace": "kube-system"}
        service = {
            "apiVersion": "v1", "kind": "Service", "metadata": meta,
            "spec": {"clusterIP": at.DNS_SERVICE_IP, "ports": ports},
        }  # fmt: skip
        slice_ = {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "kube-dns-node", "namespace": "kube-system",
                         "labels": {"kubernetes.io/service-name": "kube-dns"}},
            "endpoints": [{"addresses": [at.NODE_IP], "conditions": {"ready": True}}], "ports": ports,
        }  # fmt: skip
        path = self._layout.etc / "dns.json"
        write_json(path, {"apiVersion": "v1", "kind": "List", "items": [service, slice_]})
        self.kubectl("apply", "-f", str(path))

    def _ready(self) -> bool:
        path = "{.status.conditions[?(@.type=='Ready')].status}"
        return self._kubectl_or_empty("get", "node", at.NODE, "-o", f"jsonpath={path}") == "True"

    def _kubectl_or_empty(self, *args: str) -> str:
        try:
            return self.kubectl(*args).strip()
        except NodeError:
            return ""

    def _exists(self, *args: str) -> bool:
        return bool(self._kubectl_or_empty("get", *args, "-o", "name"))

    def _wait_for(self, condition: str, holds: Callable[[], bool], process: str, *, deadline_s: float = 90.0) -> None:
        began = time.monotonic()
        while not holds():
            if not self._processes.running(process):
                raise NodeError(f"{condition}: {process} ended:\n{self._processes.log_tail(process)}")
            if time.monotonic() - began > deadline_s:
                raise NodeError(f"{condition}: not within {deadline_s:g} s:\n{self._processes.log_tail(process)}")
            time.sleep(0.1)
        self._print_progress(f"{condition}: ready after {time.monotonic() - began:.1f} s")

    def _ctr(self, *args: str, check: bool = True) -> str:
        command = ["ctr", f"--address={self._layout.containerd_socket}", "--namespace=k8s.io", *args]
        return _run(command, check=check)

    # Down.

    def _stop_pods(self) -> None:
        """Deletes all pods through the kubelet, which removes mounts and networks, and the rest through containerd."""
        if self._processes.running("kubelet") and self._processes.running("api-server"):
            with _ignore_errors(self._print_progress):
                self.kubectl("delete", "pods", "--all", "--all-namespaces", "--grace-period=1", "--wait=false")
            deadline = time.monotonic() + 30
            while self._ctr("tasks", "ls", "-q", check=False).split() and time.monotonic() < deadline:
                time.sleep(0.2)
        self._processes.stop("kubelet")
        if not self._processes.running("containerd"):
            return
        for container in self._ctr("containers", "ls", "-q", check=False).split():
            self._ctr("tasks", "kill", "--all", "--signal=SIGKILL", container, check=False)
            self._ctr("tasks", "rm", "--force", container, check=False)
            self._ctr("containers", "rm", container, check=False)

    def _remove_network(self) -> None:
        proxy = self._layout.bin / "kube-proxy"
        if proxy.exists():
            _run([str(proxy), "--cleanup"], check=False)
        if Path("/sys/class/net", at.BRIDGE).exists():
            _run(["ip", "link", "del", at.BRIDGE])
        before = self._layout.state / "chains-before"
        if before.exists():
            chains_before = set(before.read_text().splitlines())
            remove_chains([chain for chain in node_chains() if chain not in chains_before])
        for was in self._layout.state.glob("was.*"):
            Path("/proc/sys", *was.name.removeprefix("was.").split(".")).write_text(was.read_text())

    def _unmount(self) -> None:
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        node_mounts = [m for m in mounts if m.startswith(f"{self._layout.state}/")]
        for mount in sorted(node_mounts, key=len, reverse=True):
            _run(["umount", "--lazy", mount], check=False)

    def _remove_cgroups(self) -> None:
        for top in Path("/sys/fs/cgroup").glob("**/kubepods"):
            for folder in sorted((p for p in top.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)):
                _remove_empty_dirs(folder)
            _remove_empty_dirs(top)

    def _remove_links(self) -> None:
        links = Path("/var/log/containers")
        for link in links.glob("*.log") if links.exists() else ():
            if link.is_symlink() and str(self._layout.state) in str(link.readlink()):
                link.unlink()


def _remove_empty_dirs(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # Not empty because of another process, or removed with its parent.


@contextmanager
def _ignore_errors(say: LogFunction) -> Iterator[None]:
    """Prints an error and continues, so that ``down`` removes as much as it can."""
    try:
        yield
    except NodeError as error:
        say(str(error))


def _run(command: list[str], *, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and check:
        raise NodeError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout if not done.returncode else ""


def _is_reachable(url: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
