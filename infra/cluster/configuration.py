"""Configuration files and command lines of the node's components. The files are written again at every start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layout as at
from layout import NodePaths


def write_kubeconfig(layout: NodePaths, path: Path, certificate: str) -> None:
    """Writes a kubeconfig that refers to the node's certificate files."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "reelway",
                "cluster": {
                    "server": f"https://{at.NODE_IP}:{at.API_PORT}",
                    "certificate-authority": str(layout.pki / "ca.crt"),
                },
            }
        ],
        "users": [
            {
                "name": certificate,
                "user": {
                    "client-certificate": str(layout.pki / f"{certificate}.crt"),
                    "client-key": str(layout.pki / f"{certificate}.key"),
                },
            }
        ],
        "contexts": [{"name": "reelway", "context": {"cluster": "reelway", "user": certificate}}],
        "current-context": "reelway",
    }
    write_json(path, document)


def write_json(path: Path, document: Any) -> None:
    """Writes a configuration as JSON, which every component reads as YAML.

    An unchanged file is not written, because kube-proxy exits when its file is.
    """
    text = json.dumps(document, indent=1)
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_containerd(layout: NodePaths) -> Path:
    """Writes containerd's ``config.toml``: state in the node's folder, runc, overlayfs, the local pause image."""
    path = layout.etc / "containerd.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"""version = 2
root = "{layout.state}/containerd"
state = "{layout.state}/run/containerd"
[grpc]
  address = "{layout.containerd_socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{at.PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  enable_selinux = false
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{layout.etc}/cni"
""")
    return path


def write_cni(layout: NodePaths) -> None:
    """Writes the CNI configuration: one bridge for all pods, addresses recorded in the node's folder."""
    first, last = at.POD_RANGE
    ranges = [[{"subnet": at.POD_CIDR, "rangeStart": first, "rangeEnd": last, "gateway": at.NODE_IP}]]
    ipam = {"type": "host-local", "dataDir": f"{layout.state}/cni", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": at.BRIDGE, "isGateway": True, "ipMasq": True, "hairpinMode": True}
    document = {
        "cniVersion": "0.4.0",
        "name": "reelway",
        "plugins": [{**bridge, "ipam": ipam}, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }
    write_json(layout.etc / "cni" / "10-reelway.conflist", document)


def write_resolver(layout: NodePaths) -> Path:
    """Writes a ``resolv.conf`` that resolves cluster names only."""
    path = layout.etc / "resolv.conf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"nameserver {at.DNS_SERVICE_IP}\n")
    return path


def write_kubelet(layout: NodePaths) -> Path:
    """Writes the kubelet's configuration. cgroups v1 are allowed, because small machines still use them."""
    path = layout.etc / "kubelet.yaml"
    write_json(
        path,
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": True,
            "enforceNodeAllocatable": ["pods"],
            "clusterDNS": [at.DNS_SERVICE_IP],
            "clusterDomain": at.DOMAIN,
            "resolvConf": str(write_resolver(layout)),
            "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
            "podLogsDir": f"{layout.state}/pod-logs",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(layout.pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(layout.pki / "kubelet-server.crt"),
            "tlsPrivateKeyFile": str(layout.pki / "kubelet-server.key"),
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "2%", "imagefs.available": "2%"},
            "imageGCHighThresholdPercent": 100,
            "serializeImagePulls": False,
            "maxPods": 100,
        },
    )
    return path


def write_kube_proxy(layout: NodePaths) -> Path:
    """Writes kube-proxy's configuration: iptables mode for the bridge's pods."""
    path = layout.etc / "kube-proxy.yaml"
    write_json(
        path,
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "clusterCIDR": at.POD_CIDR,
            "hostnameOverride": at.NODE,
            "clientConnection": {"kubeconfig": str(layout.kubeconfig("kube-proxy"))},
            "conntrack": {"maxPerCore": 0},
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        },
    )
    return path


def write_coredns(layout: NodePaths) -> Path:
    """Writes the Corefile, which answers cluster names only."""
    path = layout.etc / "Corefile"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f""".:53 {{
    bind {at.NODE_IP}
    errors
    ready 127.0.0.1:8181
    kubernetes {at.DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {layout.kubeconfig("coredns")} reelway
        pods insecure
        ttl 5
    }}
    cache 5
}}
""")
    return path


def write_audit_policy(layout: NodePaths) -> Path:
    """Writes an audit policy that records requests without bodies, to compare granted rights with used rights."""
    path = layout.etc / "audit.yaml"
    rules = [{"level": "Metadata", "omitStages": ["RequestReceived"]}]
    write_json(path, {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules})
    return path


def api_server_command(layout: NodePaths) -> list[str]:
    """Returns the API server's command. It listens on the bridge only."""
    pki = layout.pki
    return [
        str(layout.bin / "kube-apiserver"),
        f"--advertise-address={at.NODE_IP}",
        f"--bind-address={at.NODE_IP}",
        f"--secure-port={at.API_PORT}",
        f"--etcd-servers=http://127.0.0.1:{at.ETCD_PORT}",
        f"--service-cluster-ip-range={at.SERVICE_CIDR}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--tls-cert-file={pki / 'api-server.crt'}",
        f"--tls-private-key-file={pki / 'api-server.key'}",
        f"--kubelet-client-certificate={pki / 'api-server.crt'}",
        f"--kubelet-client-key={pki / 'api-server.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={pki / 'service-account.pub'}",
        f"--service-account-signing-key-file={pki / 'service-account.key'}",
        f"--service-account-issuer=https://kubernetes.default.svc.{at.DOMAIN}",
        f"--requestheader-client-ca-file={pki / 'ca.crt'}",
        f"--proxy-client-cert-file={pki / 'front-proxy.crt'}",
        f"--proxy-client-key-file={pki / 'front-proxy.key'}",
        "--requestheader-allowed-names=front-proxy",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--audit-policy-file={write_audit_policy(layout)}",
        f"--audit-log-path={layout.logs / 'audit.log'}",
        "--audit-log-maxsize=200",
    ]


def controller_manager_command(layout: NodePaths) -> list[str]:
    """Returns the controller manager's command, with all controllers."""
    return [
        str(layout.bin / "kube-controller-manager"),
        *_kubeconfig_args(layout, "controller-manager"),
        f"--root-ca-file={layout.pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={layout.pki / 'ca.crt'}",
        f"--cluster-signing-key-file={layout.pki / 'ca.key'}",
        f"--service-account-private-key-file={layout.pki / 'service-account.key'}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
    ]


def scheduler_command(layout: NodePaths) -> list[str]:
    """Returns the scheduler's command, with the default profile."""
    return [
        str(layout.bin / "kube-scheduler"),
        *_kubeconfig_args(layout, "scheduler"),
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
    ]


def _kubeconfig_args(layout: NodePaths, component: str) -> list[str]:
    config = layout.kubeconfig(component)
    return [f"--{purpose}kubeconfig={config}" for purpose in ("", "authentication-", "authorization-")]


def etcd_command(layout: NodePaths) -> list[str]:
    """etcd's command: loopback only, without fsync, because the data is deleted with the node."""
    url, peer = f"http://127.0.0.1:{at.ETCD_PORT}", f"http://127.0.0.1:{at.ETCD_PORT + 1}"
    return [
        "etcd",
        f"--data-dir={layout.state / 'etcd'}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
    ]


def kubelet_command(layout: NodePaths) -> list[str]:
    """Returns the kubelet's command, with its root in the node's folder."""
    return [
        str(layout.bin / "kubelet"),
        f"--config={write_kubelet(layout)}",
        f"--kubeconfig={layout.kubeconfig('kubelet')}",
        f"--root-dir={layout.state / 'kubelet'}",
        f"--hostname-override={at.NODE}",
        f"--node-ip={at.NODE_IP}",
    ]
