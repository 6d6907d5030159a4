"""An installation with all live parts: event log on Kafka, feature stream, overlay writer, catalogue API.

Kafka is a pod beside it, the online store is the chart's own Redis. A client pod runs tests/support/live_probe.py. The
service answers only viewers whose id the application's gateway, which is that pod, has signed.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.bench_results import Row
from tests.support.cluster.kubectl import ROOT, Kubectl
from tests.support.e2e import kafka_pod, redis_pod
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.installation import CLIENT, NAME, Installation
from tests.support.e2e.live_run import RUNS_PATH, LiveRun, build_live_run
from tests.support.e2e.load_pod import token_of
from tests.support.e2e.pods import image, pod

NAMESPACE: Final = "reelway-e2e-live"
KAFKA: Final = "kafka"
PROBE: Final = "probe"
CATALOGUE_URL: Final = f"http://{NAME}-catalogue:8085"
STREAM_METRICS: Final = f"http://{NAME}-stream:9102/metrics"
OVERLAY_METRICS: Final = f"http://{NAME}-overlay:9103/metrics"
STREAM_POD: Final = f"{NAME}-stream-0"
_GATEWAY_KEYS: Final = "gateway-keys"
_METRICS_PORT: Final = 9100
_PROGRAM: Final = ROOT / "tests" / "support" / "live_probe.py"
_SMALL: Final = {"requests": {"cpu": "50m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}


def live_images() -> set[str]:
    """The images that this installation requires beside those of every installation."""
    return {image("training"), kafka_pod.image(), redis_pod.image()}


def live_values() -> dict[str, Any]:
    """Values of the installation."""
    repository, _, tag = redis_pod.image().rpartition(":")
    return {
        "auth": {"mode": "gateway", "gateway": {"keysSecret": _GATEWAY_KEYS}},
        "eventLog": {"address": f"kafka://{KAFKA}:{kafka_pod.PORT}"},
        "features": {
            "type": "redis",
            "registry": f"/var/lib/reelway/volume/{RUNS_PATH}/features/registry.db",
            "redis": {"mode": "bundled", "image": {"repository": repository, "tag": tag}},
        },
        "jobs": {"runsPath": RUNS_PATH},
        "stream": {"resources": _SMALL},
        "overlay": {"resources": _SMALL},
        "networkPolicies": {"catalogueClients": [CLIENT]},
    }


@dataclass
class LiveInstallation:
    """The installation, its run and its client pod."""

    installation: Installation
    live_run: LiveRun
    rows: list[Row] = field(default_factory=list)
    next_viewer: int = 1_000_000
    """First id of viewers that no scene has used yet."""
    taken_down: list[int] = field(default_factory=list)
    """Videos that an earlier test took down."""
    counted_of_canary: tuple[int, int] | None = None
    """Impressions and outcomes of the canary of an earlier test."""
    outcomes_counted: int = 0
    """Outcomes of all arms of the same rollout."""

    @property
    def kubectl(self) -> Kubectl:
        """kubectl in the installation's namespace."""
        return self.installation.kubectl

    @property
    def catalogue_token(self) -> str:
        """Bearer token of the catalogue API."""
        return token_of(self.kubectl, f"{NAME}-secrets", "catalogue-token")

    def new_viewers(self, count: int) -> int:
        """Reserves ids of viewers whom the service does not know. Returns the first one."""
        first, self.next_viewer = self.next_viewer, self.next_viewer + count
        return first

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Runs a verb of the probe on the service."""
        return self.probe(verb, url=self.installation.url, **arguments)

    def probe(self, verb: str, **arguments: Any) -> Any:
        """Runs a verb of the probe and returns its result."""
        command = ("python", "/files/live_probe.py", verb, json.dumps(arguments))
        return json.loads(self.kubectl.run("exec", PROBE, "--", *command))

    def slates(self, viewers: Sequence[int], count: int = 20) -> list[dict[str, Any]]:
        """Returns a slate for each viewer, one after another."""
        slates: list[dict[str, Any]] = self.ask("slates", viewers=list(viewers), count=count)
        return slates

    def erase(self, viewer: int) -> dict[str, Any]:
        """Erases a viewer in a pod with the run and the credentials of all stores, and returns the report."""
        stores = ("--run", f"/var/lib/reelway/work/{RUNS_PATH}", "--state", "/var/lib/reelway/stream")
        log = ("--events", live_values()["eventLog"]["address"])
        command = ("reelway", "erase", "--viewer", str(viewer), *stores, *log, "--yes", "--json")
        report: dict[str, Any] = json.loads(self.kubectl.run("exec", STREAM_POD, "-c", "stream", "--", *command))
        return report

    def has_slates(self) -> bool:
        """Whether the service answers with videos."""
        try:
            return bool(self.slates([self.new_viewers(1)])[0]["videos"])
        except AssertionError:  # the program in the pod failed, because the service did not answer
            return False

    def router_metrics(self) -> str:
        """URL of the metrics of the head's processes."""
        address = self.kubectl.run("get", "pod", self.installation.head(), "-o", "jsonpath={.status.podIP}")
        return f"http://{address}:{_METRICS_PORT}/metrics"

    def metrics(self, *urls: str) -> str:
        """Returns the text of metrics pages, one after another."""
        return "\n".join(self.probe("metrics", urls=urls))

    def note(self, metric: str, value: float, unit: str, bar: str = "", holds: bool | None = None) -> None:
        """Adds a number to the report and prints it. It does not assert; the test does."""
        self.rows.append(Row(metric, value, unit, bar, holds))
        print(f"{metric}: {value:g} {unit} {bar}")


@contextmanager
def live_installation(cluster: Cluster) -> Iterator[LiveInstallation]:
    """Starts Kafka and the client pod, and delivers the run. The chart is installed by the caller."""
    with build_live_run(cluster) as live_run, cluster.namespace(NAMESPACE) as kubectl:
        live_run.deliver(kubectl, f"{NAME}-redis:{redis_pod.PORT}")
        kafka_pod.apply_kafka(kubectl, KAFKA)
        installation = Installation(cluster, kubectl, live_run.releases, given=live_values())
        with (
            _gateway_key(kubectl) as key,
            pod(kubectl, PROBE, files={"live_probe.py": _PROGRAM, key.name: key}),
        ):
            try:
                yield LiveInstallation(installation, live_run)
            finally:
                installation.uninstall()


@contextmanager
def _gateway_key(kubectl: Kubectl) -> Iterator[Path]:
    """Makes the secret that gateway and service share, as a file and as a Secret of the namespace."""
    with tempfile.TemporaryDirectory(prefix="reelway-e2e-gateway-") as folder:
        path = Path(folder) / "gateway.key"
        path.write_text(secrets.token_hex(32))
        kubectl.run("create", "secret", "generic", _GATEWAY_KEYS, f"--from-file=keys={path}")
        yield path
