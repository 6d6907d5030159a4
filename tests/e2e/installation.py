"""Why: an installation is what `helm install` makes of the chart, and every scene looks at the same one.

Small requests, the dev environment's values, the made releases' claim; all else is the chart's own defaults.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.cluster.conftest import Kubectl
from tests.e2e.clusters import CHART, Cluster, persistently
from tests.e2e.load_pod import token_of
from tests.e2e.made_releases import CLAIM, MadeReleases
from tests.e2e.pods import LABEL, values_files
from tests.e2e.waiting import until

NAME: Final = "reelway"
"""Of the Helm release, and so of everything."""
READY_S: Final = 180.0
CLIENT: Final = {"podSelector": {"matchLabels": LABEL}}
MONITORING: Final = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
DASHBOARD: Final = 8265
_DETAILS: Final = """
import os, sys, urllib.request
url = f"http://127.0.0.1:{sys.argv[1]}/api/serve/applications/"
asked = urllib.request.Request(url, headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
print(urllib.request.urlopen(asked, timeout=20).read().decode())
"""
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PodSeen:
    """One pod, as far as a restart would change it."""

    uid: str
    restarts: int


@dataclass
class Installation:
    """One Helm release in one namespace."""

    cluster: Cluster
    kubectl: Kubectl
    releases: MadeReleases
    mode: str = "kuberay"
    given: dict[str, Any] = field(default_factory=dict)
    """Values of this installation, over the environment's."""

    @property
    def url(self) -> str:
        """Of the routers, as pods of the namespace see it."""
        return f"http://{NAME}-router:8000"

    @property
    def webhook(self) -> str:
        """Where Alertmanager delivers."""
        return f"http://{NAME}-controller:9094/api/v1/alerts"

    @property
    def webhook_token(self) -> str:
        """Its bearer token."""
        return token_of(self.kubectl, f"{NAME}-secrets", "webhook-token")

    def install(self, values: Values | None = None, *options: str) -> None:
        """`helm install`, with further values. CRDs that another installation of the cluster brought are left."""
        known = self.kubectl.run("get", "crd", "releaserollouts.reelway.dev", "--ignore-not-found", "-o", "name")
        self._helm("install", values or {}, *(("--skip-crds",) if known.strip() else ()), *options)

    def upgrade(self, values: Values | None = None, *options: str) -> None:
        """`helm upgrade` to these further values in place of those of before."""
        self._helm("upgrade", values or {}, *options)

    def roll_back(self, revision: int) -> None:
        """`helm rollback`."""
        self.cluster.helm(self.kubectl.namespace, "rollback", NAME, str(revision))

    def revision(self) -> int:
        """The Helm release's newest."""
        history = json.loads(self.cluster.helm(self.kubectl.namespace, "history", NAME, "-o", "json"))
        return max(int(one["revision"]) for one in history)

    def test(self) -> str:
        """`helm test`, with its log."""
        return self.cluster.helm(self.kubectl.namespace, "test", NAME, "--logs", "--timeout", "150s")

    def uninstall(self) -> None:
        """`helm uninstall`, until the pods are gone. Nothing to do where there is none."""
        persistently(lambda: self.cluster.helm(self.kubectl.namespace, "uninstall", NAME, "--ignore-not-found"))
        until("the installation's pods are gone", lambda: not self.pods(), 120, lambda: str(self.pods()))

    def pods(self, *components: str) -> dict[str, PodSeen]:
        """The installation's pods by name: all, or those of some components."""
        wanted = f"app.kubernetes.io/instance={NAME}"
        if components:
            wanted += f",reelway.dev/component in ({','.join(components)})"
        found = json.loads(self.kubectl.run("get", "pods", "-l", wanted, "-o", "json"))["items"]
        return {
            one["metadata"]["name"]: PodSeen(
                one["metadata"]["uid"],
                sum(container["restartCount"] for container in one["status"].get("containerStatuses", ())),
            )
            for one in found
        }

    def head(self) -> str:
        """Name of the pod that is Ray's head."""
        names = self._heads()
        assert len(names) == 1, f"expected one head, found {names}"
        return names[0]

    def _heads(self) -> list[str]:
        wanted = f"app.kubernetes.io/instance={NAME},reelway.dev/role=head"
        found = self.kubectl.run("get", "pods", "-l", wanted, "-o", "jsonpath={.items[*].metadata.name}")
        return found.split()

    def until_other_head(self, before: Mapping[str, PodSeen]) -> None:
        """The head is a pod that was not there before."""
        until("there is another head", lambda: set(self._heads()) - before.keys(), 60, lambda: str(self._heads()))

    def until_ready(self) -> None:
        """The controller answers, and KubeRay calls the RayService ready (the head, in static mode)."""
        self.kubectl.run("rollout", "status", f"deployment/{NAME}-controller", f"--timeout={60}s")
        ready = "--for=condition=Ready"
        if self.mode == "static":
            until("there is a head", lambda: self._named("statefulset", f"{NAME}-head"), 30)
            self.kubectl.run("wait", ready, f"pod/{NAME}-head-0", "--timeout=80s")
            return
        until("RayService Ready", self.ray_service_ready, READY_S, lambda: json.dumps(self.ray_service_status()))

    def ray_service_ready(self) -> bool:
        """As KubeRay says."""
        conditions = self.ray_service_status().get("conditions", ())
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def ray_service_status(self) -> dict[str, Any]:
        """KubeRay's account."""
        found: dict[str, Any] = json.loads(self.kubectl.run("get", "rayservice", NAME, "-o", "json"))
        return dict(found.get("status") or {})

    def serve_details(self) -> dict[str, Any]:
        """What Serve itself says of its applications."""
        said = self.kubectl.run("exec", self.head(), "-c", "ray", "--", "python", "-c", _DETAILS, str(DASHBOARD))
        found: dict[str, Any] = json.loads(said)
        return found

    def _named(self, kind: str, name: str) -> bool:
        return bool(self.kubectl.run("get", kind, name, "--ignore-not-found", "-o", "name").strip())

    def _helm(self, verb: str, values: Values, *more: str) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(_over(_over(self._values(), self.given), values), file)
            file.flush()
            files = [str(path) for path in (*values_files(), Path(file.name))]
            options = [option for path in files for option in ("-f", path)]
            self.cluster.helm(self.kubectl.namespace, verb, NAME, str(CHART), *options, *more)

    def _values(self) -> dict[str, Any]:
        return {
            "releases": {
                "initial": self.releases.ids[0],
                "store": {"type": "pvc", "path": "releases", "pvc": {"existingClaim": CLAIM}},
            },
            "ray": {"mode": self.mode},
            "serving": {"head": {"resources": {"requests": {"cpu": "100m", "memory": "1Gi"}}}},
            "networkPolicies": {"clients": [CLIENT], "monitoring": [MONITORING, CLIENT]},
        }


def _over(below: Values, above: Values) -> dict[str, Any]:
    """Values over values, as Helm lays them."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _over(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged
