"""Constant traffic from a pod, which shows whether an operation costs requests.

The pod runs tests/support/constant_load.py in open loop and records time, status, arm and release of every request.
All times are from the pod's clock, including those of ``alert`` and ``now``.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tests.support.cluster.kubectl import ROOT, Kubectl
from tests.support.constant_load import RECORD, TIMEOUT_S, WATCHED
from tests.support.e2e.pods import pod
from tests.support.e2e.wait_until import until

RATE: Final = float(os.environ.get("REELWAY_E2E_RATE", "10"))
"""Requests per second. Set ``REELWAY_E2E_RATE`` lower on a busy machine."""
VIEWERS: Final = 5_000
_RECORD: Final = "/tmp/record"
_TAIL: Final = 'test ! -e "$0" || tail -c "$1" "$0"'
"""Prints nothing before the program has started."""
_PROGRAM: Final = ROOT / "tests" / "support" / "constant_load.py"
_ALERT: Final = """
import sys, time, urllib.request
url, token, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
sent = time.time()
urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=10).read()
print(sent)
"""


@dataclass
class Load:
    """Traffic in progress."""

    kubectl: Kubectl
    name: str
    rate: float
    _read: bytearray = field(default_factory=bytearray)
    _alerts: int = 0

    def now(self) -> float:
        """Unix time of the pod."""
        return float(self.kubectl.run("exec", self.name, "--", "date", "+%s.%N"))

    def rows(self, *, since: float = 0.0, before: float = np.inf) -> NDArray[np.void]:
        """Records of requests that were sent between two times and have a result."""
        command = [self.kubectl.program, "--kubeconfig", str(self.kubectl.kubeconfig), "-n", self.kubectl.namespace,
                   "exec", self.name, "--", "sh", "-c", _TAIL, _RECORD, f"+{len(self._read) + 1}"]  # fmt: skip
        self._read += subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
        complete = len(self._read) // RECORD.itemsize * RECORD.itemsize
        rows = np.frombuffer(bytes(self._read[:complete]), dtype=RECORD)
        return rows[(rows["sent"] >= since) & (rows["sent"] < before)]

    def settled(self, *, since: float, before: float) -> NDArray[np.void]:
        """Waits until every request has an answer or has timed out, then returns ``rows``."""
        sent = (before - since) * self.rate - 1
        until(
            f"{sent:.0f} requests are recorded",
            lambda: len(self.rows(since=since, before=before)) >= sent or self.now() > before + TIMEOUT_S + 1,
            TIMEOUT_S + 10,
            self.last_log_lines,
        )
        return self.rows(since=since, before=before)

    def failed(self, *, since: float, before: float) -> NDArray[np.void]:
        """Records of requests between two times that got no slate."""
        rows = self.settled(since=since, before=before)
        return rows[rows["status"] != 200]

    def answers(self, release: str, *, since: float = 0.0) -> NDArray[np.void]:
        """Records of requests since a time that this release answered."""
        rows = self.rows(since=since)
        return rows[(rows["release"] == release[:12].encode()) & (rows["status"] == 200)]

    def wait_until_answered_by(self, release: str, *, since: float, within_s: float, count: int = 1) -> float:
        """Waits for slates of a release and returns the time of the first one."""
        until(
            f"{count} slates of {release[:12]}",
            lambda: len(self.answers(release, since=since)) >= count,
            within_s,
            self.last_log_lines,
        )
        return float(self.answers(release, since=since)["done"].min())

    def alert(self, url: str, token: str, release: str) -> float:
        """Sends an alert for a release as Alertmanager does. Returns the time before it was sent."""
        self._alerts += 1
        labels = {"alertname": "CanaryErrors", "release": release[:12], "severity": "page"}
        alert = {
            "status": "firing", "labels": labels, "annotations": {}, "startsAt": "@", "generatorURL": "",
            "endsAt": "0001-01-01T00:00:00Z", "fingerprint": f"{self._alerts:016x}",
        }  # fmt: skip
        body: dict[str, Any] = {
            "version": "4", "groupKey": f"e2e-{self._alerts}", "status": "firing", "receiver": "reelway",
            "groupLabels": {}, "commonLabels": labels, "commonAnnotations": {}, "externalURL": "", "alerts": [alert],
        }  # fmt: skip
        started = self.kubectl.run("exec", self.name, "--", "date", "-u", "+%Y-%m-%dT%H:%M:%S.%6NZ").strip()
        text = json.dumps(body).replace("@", started)
        return float(self.kubectl.run("exec", self.name, "--", "python", "-c", _ALERT, url, token, text))

    def stop(self) -> None:
        """Stops the traffic. Records that were read are kept."""
        self.kubectl.run("delete", "pod", self.name, "--wait=true", "--timeout=60s")

    def last_log_lines(self) -> str:
        """The last log lines of the pod."""
        return "last log lines of the load: " + self.kubectl.run("logs", self.name, "--tail=5").strip()


@contextmanager
def constant_load(
    kubectl: Kubectl, url: str, *, rate: float = RATE, viewers: int = VIEWERS, name: str = "load"
) -> Iterator[Load]:
    """Sends ``rate`` requests per second until the block is left, whether or not the service answers.

    Outcomes follow every slate, with the same distribution on every arm.
    """
    command = ["python", "/files/constant_load.py", url, _RECORD, str(rate), str(viewers), WATCHED]
    with pod(kubectl, name, command, {"constant_load.py": _PROGRAM}):
        yield Load(kubectl, name, rate)


def token_of(kubectl: Kubectl, secret: str, key: str) -> str:
    """Returns one value of a Secret."""
    data = json.loads(kubectl.run("get", "secret", secret, "-o", "json"))["data"]
    return base64.b64decode(data[key]).decode()
