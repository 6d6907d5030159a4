"""``reelway drill`` against a real controller process: all traffic ends on stable, detected or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import pytest
from tests.support.cli.controller_process import EVIDENCE
from tests.support.cli.rollout_fixtures import RunDirectoryEnvironment, dead_pid, reelway, weights_of

from reelway.platform.cli.drill import drill_command as drill
from reelway.platform.cli.drill.report import DrillReport
from reelway.platform.cli.processes import child_process, reelway_command
from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.metric_names import REQUESTS
from reelway.platform.rollout.state import Phase
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficTarget

POLICY = """
name: brief
steps: [{weight_percent: 10, hold_s: 0.2, minimum_viewers: 50, minimum_impressions: 100},
        {weight_percent: 50, hold_s: 3600}]
outcomes: [{name: long_watch_rate, margin: 0.05, tuned_for: 0.2}]
cooldown_s: 0
"""


class Metrics(BaseHTTPRequestHandler):
    """The router's /metrics. Each read adds ``server.rate`` requests."""

    def do_GET(self) -> None:
        server = self.server
        server.count += server.rate  # type: ignore[attr-defined]
        body = f'# TYPE {REQUESTS} counter\n{REQUESTS}{{arm="stable",outcome="ok"}} {server.count}\n'  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Suppresses the access log."""


@dataclass
class Service:
    """A served run with a controller process."""

    world: RunDirectoryEnvironment
    run: Path
    bad: str
    stable: str
    server: ThreadingHTTPServer

    def evidence(self, **seen: object) -> None:
        """Sets the evidence that the controller reads from now on."""
        aside = self.run / "evidence.new"
        aside.write_text(json.dumps(seen))
        aside.replace(self.run / EVIDENCE)

    def drill(self, *more: object) -> tuple[int, DrillReport]:
        policy = self.run / "brief.yaml"
        ended = reelway(
            "drill", "--run", self.run, "--release", self.bad, "--policy", policy, "-o", "json", *more
        )  # fmt: skip
        assert ended.out, ended.err
        jsonschema.validate(json.loads(ended.out), DrillReport.model_json_schema(mode="serialization"))
        return ended.code, DrillReport.model_validate_json(ended.out)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, released: tuple[Path, tuple[str, str]]) -> Iterator[Service]:
    """One service for all drills: each drill ends on stable, where the next one starts."""
    run, (stable, bad) = tmp_path_factory.mktemp("drilled") / "run", released[1]
    shutil.copytree(released[0], run)
    world = RunDirectoryEnvironment(run)
    world.backend.inner.write(TrafficTarget(Routing.single_release(stable), (stable,)))
    (run / "brief.yaml").write_text(POLICY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    server.count, server.rate = 0, 1  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    world.served(stable, url=f"http://127.0.0.1:{server.server_port}")
    service_run = Service(world, run, bad, stable, server)
    service_run.evidence(viewers=2_400)
    record = run / "rollout" / "controller.json"
    command = [*reelway_command()[:1], "-m", "tests.support.cli.controller_process", str(run)]
    try:
        with child_process(command, log=run / "controller.log"):
            until(record.exists, "the controller listens")
            yield service_run
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def on_stable(service: Service) -> bool:
    weights = weights_of(service.world)
    return service.world.state.phase is Phase.ROLLED_BACK and weights[Arm.CANARY] == 0


def test_drill_ends_on_stable_whether_or_not_detected(
    service: Service,
) -> None:
    service.evidence(viewers=2_400, errors=2_000)
    (service.run / "traffic.json").write_text(json.dumps({"requests": 100, "failed": 3}))
    code, report = service.drill("--traffic-report", service.run / "traffic.json", "--deadline", 20)
    assert (code, report.passed, report.caught_by) == (0, True, ("error_ratio",))
    assert (report.weight_percent, report.viewers, report.requests, report.failed_requests) == (10, 2_400, 0, 0)
    assert report.decision_to_stable_ms is not None
    assert 0 <= report.decision_to_stable_ms < 5_000
    assert report.first_exposure_at is not None
    assert report.detected_at is not None
    assert 0 < report.detected_at - report.first_exposure_at < report.total_s
    assert on_stable(service)

    service.evidence(viewers=2_400)
    code, report = service.drill("--detected-by", "alert", "--deadline", 5)
    assert (code, report.caught_by) == (0, ("firing_alerts",))
    assert report.alerted_at is not None
    assert report.detected_after_s is not None
    assert 0 <= report.detected_after_s < 2
    assert (report.viewers, report.stable_release) == (2_400, service.stable)
    alerts = service.world.store.alerts()
    assert [alert.resolved for alert in alerts.values()] == [True]
    assert on_stable(service)

    code, report = service.drill("--deadline", 1)
    assert (code, report.passed, report.caught_by, report.on_stable) == (11, False, (), True)
    assert report.rollout.startswith("d-")
    assert "the drill is over" in report.reason
    assert on_stable(service)

    service.evidence(viewers=2_400, drop=0.4)
    text = reelway("drill", "--run", service.run, "--release", service.bad, "--policy", service.run / "brief.yaml")
    assert text.code == 0
    for words in ("PASSED", "long_watch_rate", f"all traffic on {service.stable[:12]}", "10 % of the viewers"):
        assert words in text.out


def test_drill_requires_traffic(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "TRAFFIC_PROBE_S", 0.6)
    monkeypatch.setattr(service.server, "rate", 0)
    rollouts = len(service.world.store.all())
    ended = reelway("drill", "--run", service.run, "--release", service.bad)
    assert (ended.code, ended.out) == (9, "")
    assert f"reelway traffic --run {service.run}" in ended.err
    assert len(service.world.store.all()) == rollouts


def test_ctrl_c_rolls_back_a_drill_but_not_a_watched_rollout(service: Service) -> None:
    service.evidence(viewers=2_400)
    before, brief = len(service.world.store.all()), str(service.run / "brief.yaml")
    command = ("drill", "--run", str(service.run), "--release", service.bad, "--policy", brief, "--deadline", "60")
    with child_process(reelway_command(*command), log=service.run / "drill.log") as process:
        until(lambda: len(service.world.store.all()) > before and service.world.state.step == 1, "the last step")
        watch = reelway_command("rollout", "watch", "--run", str(service.run))
        with child_process(watch, log=service.run / "watch.log") as watching:
            until(lambda: "stepping" in (service.run / "watch.log").read_text(), "the watch shows it")
            os.killpg(watching.pid, signal.SIGINT)
            assert watching.wait(60) == 130
        assert "the rollout continues" in (service.run / "watch.log").read_text()
        assert service.world.state.active
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    assert on_stable(service)
    assert "the drill rolls its release back" in (service.run / "drill.log").read_text()


def test_drill_requires_a_service_and_a_controller(run_with_releases: Path, releases: tuple[str, str]) -> None:
    world = RunDirectoryEnvironment(run_with_releases)
    assert "is not being served" in reelway("drill", "--run", world.run, "--release", releases[1]).err
    world.served(releases[0])
    assert "no controller is running" in reelway("drill", "--run", world.run, "--release", releases[1]).err
    world.controlled(dead_pid())
    assert reelway("drill", "--run", world.run, "--release", releases[1]).code == 9
