"""A small Ray Serve without Ray: it accepts configurations and counts simulated outcomes by arm.

It runs in the test's process, so that the traffic outlives a killed operator.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.sequential import overlap_weight
from reelway.platform.rollout.traffic.routing import Routing

STABLE, GOOD, BAD = "a" * 64, "b" * 64, "c" * 64


def document(routing: Routing) -> dict[str, Any]:
    """A minimal configuration with the structure of the composed one."""

    def application(name: str, deployment: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "route_prefix": None, "import_path": f"made:{name[:3]}", "deployments": [
            {"name": deployment, "num_replicas": 1, **more}]}  # fmt: skip

    releases = [{**application(name, "Release"), "args": {"release": name}} for name in routing.releases]
    router = application("router", "Router", user_config=routing.model_dump(mode="json"))
    return {"http_options": {"host": "0.0.0.0", "port": 8000}, "applications": [*releases, router]}


class FakeServe:
    """Dashboard and router at one address. ``written`` are all routings received, with their times."""

    def __init__(self) -> None:
        self.document = document(Routing.single_release(STABLE))
        self.written: list[tuple[float, Routing]] = []
        self.refuses = False
        self.before_taking: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._viewers: dict[tuple[str, str, str], float] = {}
        self._weights: dict[tuple[str, str, str], tuple[float, float]] = {}
        self._counted_at = time.monotonic()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def routing(self) -> Routing:
        router = next(app for app in self.document["applications"] if app["name"] == "router")
        return Routing.model_validate(router["deployments"][0]["user_config"])

    @property
    def releases(self) -> set[str]:
        return {app["name"] for app in self.document["applications"] if app["name"] != "router"}

    def take(self, told: dict[str, Any]) -> None:
        """Accepts a configuration from any writer."""
        self.before_taking()
        with self._lock:
            self._count()
            self.document = told
            self.written.append((time.monotonic(), self.routing))

    def _count(self) -> None:
        """Counts 100,000 viewers per second, split by weight."""
        now = time.monotonic()
        for arm in self.routing.arms:
            key = (self.routing.rollout, arm.release[: names.SHORT_RELEASE], arm.arm.value)
            seen = (now - self._counted_at) * 1e5 * arm.weight_bp / 10_000
            self._viewers[key] = self._viewers.get(key, 0.0) + seen
            shares = {one.arm: one.weight_bp for one in self.routing.arms}
            weight = overlap_weight(shares.get(Arm.CANARY, 0), shares.get(Arm.STABLE, 0), canary=arm.arm is Arm.CANARY)
            sum_w, sum_ww = self._weights.get(key, (0.0, 0.0))
            self._weights[key] = (sum_w + seen * weight, sum_ww + seen * weight**2)
        self._counted_at = now

    def _outcomes(self) -> str:
        with self._lock:
            self._count()
            counted, weights = dict(self._viewers), dict(self._weights)
        lines, audience = [], [f"# TYPE {names.AUDIENCE} counter", f"# TYPE {names.AUDIENCE_WEIGHT} gauge"]
        for (rollout, release, arm), viewers in counted.items():
            labels = f'rollout="{rollout}",release="{release}",arm="{arm}",slice="overall"'
            mean = 2.0 if release == BAD[: names.SHORT_RELEASE] else 5.0
            exposure = {
                "viewers": 1.0,
                "impressions": 10.0,
                "sum_x": 10.0,
                "sum_xx": 100.0,
                "idle_x": 0.0,
                "idle_xx": 0.0,
            }
            metric = {"sum_y": mean, "sum_yy": mean * mean + 2.5, "sum_xy": 10 * mean}
            lines += [f'{names.EXPOSURE}{{{labels},statistic="{k}"}} {v * viewers}' for k, v in exposure.items()]
            lines += [
                f'{names.STATISTIC}{{{labels},metric="long_watch_rate",statistic="{k}"}} {v * viewers}'
                for k, v in metric.items()
            ]
            arm_labels = labels.replace(',slice="overall"', "")
            audience.insert(1, f'{names.AUDIENCE}{{{arm_labels},statistic="viewers"}} {viewers}')
            for group in names.AUDIENCE_GROUPS:
                for statistic, total in zip(names.WEIGHT_STATISTICS, weights[rollout, release, arm], strict=True):
                    value = total if group == "all" else 0.0
                    line = f'{names.AUDIENCE_WEIGHT}{{{arm_labels},kind="{group}",statistic="{statistic}"}} {value}'
                    audience.append(line)
        kinds = [f"# TYPE {name} gauge" for name in (names.EXPOSURE, names.STATISTIC)]
        return "\n".join([kinds[0], *(one for one in lines if one.startswith(names.EXPOSURE)), kinds[1],
                          *(one for one in lines if one.startswith(names.STATISTIC)), *audience]) + "\n"  # fmt: skip

    def _page(self, path: str) -> tuple[int, str]:
        if path == "/api/serve/applications/":
            running = {
                app["name"]: {"status": "RUNNING", "deployed_app_config": app, "deployments": {}}
                for app in self.document["applications"]
            }
            return 200, json.dumps({"applications": running, "http_options": self.document["http_options"]})
        if path == "/v1/releases/current":
            routing = self.routing
            return 200, json.dumps({"routing": routing.model_dump(mode="json"), "open": list(routing.releases)})
        if path == "/v1/outcomes/metrics":
            return 200, self._outcomes()
        return (200, "# nothing\n") if path == "/metrics" else (404, "")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        serve = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(*serve._page(self.path))

            def do_PUT(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if serve.refuses:
                    self._answer(500, "no")
                    return
                serve.take(told)
                self._answer(200, "{}")

            def _answer(self, status: int, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
