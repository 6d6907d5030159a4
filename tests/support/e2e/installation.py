"""An installation of the chart on a real cluster.

Values: those of the dev environment, small resource requests and the claim of the release fixtures. Everything else is
the chart's default.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import CHART, Cluster, retry_cleanup
from tests.support.e2e.load_pod import token_of
from tests.support.e2e.pods import LABEL, values_files
from tests.support.e2e.release_fixtures import CLAIM, ReleaseFixtures
from tests.support.e2e.wait_until import until

NAME: Final = "reelway"
"""Name of the Helm release and so of all objects."""
READY_TIMEOUT_S: Final = 180.0
CLIENT: Final = {"podSelector": {"matchLabels": LABEL}}
MONITORING: Final = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
DASHBOARD: Final = 8265
_DETAILS: Final = """
import os, sys, urllib.request
url = f"http://127.0.0.1:{sys.argv[1]}/api/serve/applications/"
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
print(urllib.request.urlopen(request, timeout=20).read().decode())
"""
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """The fields of a pod that a restart or a replacement changes."""

    uid: str
    restarts: int


@dataclass
class Installation:
    """One Helm release in one namespace."""

    cluster: Cluster
    kubectl: Kubectl
    releases: ReleaseFixtures
    given: dict[str, Any] = field(default_factory=dict)
    """Values of this installation; they override the environment's."""

    @property
    def url(self) -> str:
        """Base URL of the router for pods of the namespace."""
        return f"http://{NAME}-router:8000"

    @property
    def internal_url(self) -> str:
        """Base URL of the internal API for pods of the namespace."""
        return f"http://{NAME}-head-svc:8001"

    @property
    def webhook(self) -> str:
        """URL that Alertmanager delivers alerts to."""
        return f"http://{NAME}-operator:9094/api/v1/alerts"

    @property
    def webhook_token(self) -> str:
        """Bearer token of the webhook."""
        return token_of(self.kubectl, f"{NAME}-secrets", "webhook-token")

    def install(self, values: Values | None = None, *options: str) -> None:
        """Runs `helm install` with additional values. CRDs that exist already are left alone."""
        crd = self.kubectl.run("get", "crd", "releaserollouts.reelway.dev", "--ignore-not-found", "-o", "name")
        self._helm("install", values or {}, *(("--skip-crds",) if crd.strip() else ()), *options)

    def upgrade(self, values: Values | None = None, *options: str) -> None:
        """Runs `helm upgrade`; these additional values replace those of the previous call."""
        self._helm("upgrade", values or {}, *options)

    def upgrade_reusing_values(self) -> None:
        """Runs `helm upgrade --reuse-values`."""
        self.cluster.helm(self.kubectl.namespace, "upgrade", NAME, str(CHART), "--reuse-values")

    def apply(self, values: Values | None = None) -> None:
        """Runs `helm template | kubectl apply --server-side`: rendered without a cluster, as by a GitOps controller."""
        with self._values_options(values or {}) as options:
            args = ("template", NAME, str(CHART), "--skip-tests", *options)
            manifests = self.cluster.helm(self.kubectl.namespace, *args)
        self.kubectl.run("apply", "--server-side", "-f", "-", stdin=manifests)

    def roll_back(self, revision: int) -> None:
        """Runs `helm rollback`."""
        self.cluster.helm(self.kubectl.namespace, "rollback", NAME, str(revision))

    def revision(self) -> int:
        """Newest revision of the Helm release."""
        history = json.loads(self.cluster.helm(self.kubectl.namespace, "history", NAME, "-o", "json"))
        return max(int(entry["revision"]) for entry in history)

    def test(self) -> str:
        """Runs `helm test` and returns its log."""
        return self.cluster.helm(self.kubectl.namespace, "test", NAME, "--logs", "--timeout", "150s")

    def uninstall(self) -> None:
        """Runs `helm uninstall` if installed, and waits until the pods are deleted."""
        retry_cleanup(lambda: self.cluster.helm(self.kubectl.namespace, "uninstall", NAME, "--ignore-not-found"))
        until("the installation's pods are deleted", lambda: not self.pods(), 120, lambda: str(self.pods()))

    def pods(self, *components: str) -> dict[str, PodIdentity]:
        """Pods of the installation by name: all, or those of these components."""
        condition = (
            f"in ({','.join(components)})" if components else "notin (secrets)"
        )  # the hook's pods are short-lived
        selector = f"app.kubernetes.io/instance={NAME},reelway.dev/component {condition}"
        pods = json.loads(self.kubectl.run("get", "pods", "-l", selector, "-o", "json"))["items"]
        return {
            pod["metadata"]["name"]: PodIdentity(
                pod["metadata"]["uid"],
                sum(container["restartCount"] for container in pod["status"].get("containerStatuses", ())),
            )
            for pod in pods
        }

    def head(self) -> str:
        """Name of the head pod."""
        names = self._heads()
        assert len(names) == 1, f"expected one head, found {names}"
        return names[0]

    def _heads(self) -> list[str]:
        selector = f"app.kubernetes.io/instance={NAME},reelway.dev/role=head"
        names = self.kubectl.run("get", "pods", "-l", selector, "-o", "jsonpath={.items[*].metadata.name}")
        return names.split()

    def wait_until_other_head(self, before: Mapping[str, PodIdentity]) -> None:
        """Waits until the head is a pod that is not in ``before``."""
        until("the head has a new pod", lambda: set(self._heads()) - before.keys(), 60, lambda: str(self._heads()))

    def wait_until_ready(self) -> None:
        """Waits until the operator is rolled out and KubeRay reports the RayService ready."""
        self.kubectl.run("rollout", "status", f"deployment/{NAME}-operator", f"--timeout={60}s")
        until(
            "RayService Ready", self.ray_service_ready, READY_TIMEOUT_S, lambda: json.dumps(self.ray_service_status())
        )

    def ray_service_ready(self) -> bool:
        """Whether KubeRay reports the RayService ready."""
        conditions = self.ray_service_status().get("conditions", ())
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def ray_service_status(self) -> dict[str, Any]:
        """Status of the RayService."""
        service: dict[str, Any] = json.loads(self.kubectl.run("get", "rayservice", NAME, "-o", "json"))
        return dict(service.get("status") or {})

    def serve_details(self) -> dict[str, Any]:
        """Response of Serve's REST API about its applications."""
        answer = self.kubectl.run("exec", self.head(), "-c", "ray", "--", "python", "-c", _DETAILS, str(DASHBOARD))
        details: dict[str, Any] = json.loads(answer)
        return details

    def routing(self) -> dict[str, Any]:
        """The routing that the router uses."""
        program = "import urllib.request as r,sys; print(r.urlopen(sys.argv[1], timeout=20).read().decode())"
        url = "http://127.0.0.1:8001/v1/releases/current"
        answer = self.kubectl.run("exec", self.head(), "-c", "ray", "--", "python", "-c", program, url)
        routing: dict[str, Any] = json.loads(answer)["routing"]
        return routing

    def _helm(self, verb: str, values: Values, *more: str) -> None:
        with self._values_options(values) as options:
            self.cluster.helm(self.kubectl.namespace, verb, NAME, str(CHART), *options, *more)

    @contextmanager
    def _values_options(self, values: Values) -> Iterator[list[str]]:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(_merged(_merged(self._values(), self.given), values), file)
            file.flush()
            files = [str(path) for path in (*values_files(), Path(file.name))]
            yield [option for path in files for option in ("-f", path)]

    def _values(self) -> dict[str, Any]:
        return {
            "releases": {
                "initial": self.releases.ids[0],
                "store": {"type": "pvc", "path": "releases", "pvc": {"existingClaim": CLAIM}},
            },
            "serving": {"head": {"resources": {"requests": {"cpu": "100m", "memory": "1Gi"}}}},
            "networkPolicies": {"clients": [CLIENT], "monitoring": [MONITORING, CLIENT]},
        }


def _merged(below: Values, above: Values) -> dict[str, Any]:
    """Returns ``below`` with ``above`` merged over it, as Helm merges values."""
    merged = dict(below)
    for key, value in above.items():
        existing = merged.get(key)
        merged[key] = (
            _merged(existing, value) if isinstance(existing, Mapping) and isinstance(value, Mapping) else value
        )
    return merged
