"""Rollouts in a run directory with the real controller and store; the traffic is a file."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import typer
from tests.support.rollout.canary_events import RELEASE, STABLE
from tests.support.rollout.controller_environment import QUICK, Clock, ControllerEnvironment
from typer.testing import CliRunner

from reelway.platform.cli.drill import drill_command as drill
from reelway.platform.cli.rollout import rollout_commands as rollout
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ReelwayError
from reelway.platform.rollout.decision import start_state
from reelway.platform.rollout.evidence import (
    ArmStatistics,
    EvidenceSnapshot,
    EvidenceState,
    FiringAlert,
    GuardrailReading,
    MetricEvidence,
)
from reelway.platform.rollout.policy import RolloutPolicy, Slice, default_policy, parse_policy
from reelway.platform.rollout.records import Rollout
from reelway.platform.rollout.state import RolloutState

SWIFT_TEXT = """
name: swift
steps:
  - {weight_percent: 10, hold_s: 0.3, minimum_viewers: 100, minimum_impressions: 500}
  - {weight_percent: 50, hold_s: 0.3, minimum_viewers: 100, minimum_impressions: 500}
outcomes: [{name: long_watch_rate, margin: 0.05, tuned_for: 0.2}]
cooldown_s: 600
retention_s: 3600
"""
SWIFT = parse_policy(SWIFT_TEXT, source="swift")
"""A policy whose ramp takes about one second with good evidence."""
RATES = {
    "long_watch_rate": 0.4, "watch_s_per_impression": 0.6, "like_rate": 0.15, "skip_rate": 0.3,
    "not_interested_rate": 0.05, "report_rate": 0.03,
}  # fmt: skip


@lru_cache(maxsize=256)
def arm(viewers: int, rate: float, seed: int) -> ArmStatistics:
    """Returns the statistics of viewers with about a dozen impressions each."""
    rng = np.random.default_rng(seed)
    x = 1.0 + rng.poisson(10, viewers)
    y = rng.binomial(x.astype(int), rng.beta(20 * rate, 20 * (1 - rate), viewers)).astype(float)
    return ArmStatistics(viewers, x.sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())


@dataclass
class SyntheticEvidence:
    """Evidence for every metric of the default policy. ``drop`` is the relative loss of long watches."""

    viewers: int = 4_000
    drop: float = 0.0
    errors: int = 2
    silent: bool = False
    alerts: tuple[FiringAlert, ...] = ()

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        if self.silent:
            return EvidenceSnapshot(time=now, release=state.canary_release)
        metrics = {}
        for seed, (metric, part) in enumerate(policy.tests):
            rate = RATES[metric.name]
            drop = self.drop if metric.name == "long_watch_rate" else 0.0
            share = 1.0 if part is Slice.OVERALL else 0.25
            few, many = round(self.viewers * share), round(3 * self.viewers * share)
            seen = arm(many, rate, 2 * seed), arm(few, rate * (1 - drop), 2 * seed + 1)
            metrics[metric.name, part] = MetricEvidence(EvidenceState.OK, *seen)
        ok, requests = EvidenceState.OK, 2 * self.viewers
        return EvidenceSnapshot(
            now, state.canary_release, metrics,
            {
                "error_ratio": GuardrailReading(ok, self.errors if state.canary_bp else 0, requests),
                "empty_slate_ratio": GuardrailReading(ok, 0, requests),
                "p99_ms": GuardrailReading(ok, trials=requests, value=61.0, stable_value=58.0),
                "parity_mismatches": GuardrailReading(ok, 0, 120),
            },
            self.alerts,
        )  # fmt: skip


class RunDirectoryEnvironment(ControllerEnvironment):
    """A world whose store is in a run directory, where the commands read it. Its clock starts five minutes ago."""

    def __init__(self, run: Path, policy: RolloutPolicy = QUICK) -> None:
        self.run = run
        (run / "rollout").mkdir(parents=True, exist_ok=True)
        super().__init__(run / "rollout", policy, Clock(time.time() - 300))

    def see_all(self, **evidence: object) -> SyntheticEvidence:
        """Provides evidence for every metric of the default policy from now on."""
        self.policy = default_policy()
        self.source = SyntheticEvidence(**evidence)  # type: ignore[arg-type,assignment]
        self.restart()
        return self.source  # type: ignore[return-value]

    def served(self, release: str = STABLE, *, pid: int | None = None, url: str = "http://127.0.0.1:1") -> None:
        """Writes the record of a running ``reelway serve`` with this process's id."""
        record = {
            "url": url, "internal_url": url, "pid": pid or os.getpid(), "release": release,
            "serve_api": "http://127.0.0.1:2",
        }  # fmt: skip
        (self.run / "serving.json").write_text(json.dumps(record))

    def controlled(self, pid: int | None = None) -> None:
        """Writes the record of a running controller with this process's id."""
        record = {"url": "http://127.0.0.1:3", "pid": pid or os.getpid()}
        (self.run / "rollout" / "controller.json").write_text(json.dumps(record))

    def begin(self, rollout_id: str = "r-20260131-3fa91c") -> Rollout:
        latest = self.store.latest()
        state = start_state(
            self.policy, rollout_id=rollout_id, canary_release=RELEASE, stable_release=STABLE, now=self.clock(),
            previous=latest.state if latest else None, force=latest is not None,
        )  # fmt: skip
        return self.store.create(state, self.policy)

    def catch_up(self) -> None:
        """Reconciles once at the current time."""
        self.clock.now = time.time()
        self.controller.reconcile()


def weights_of(world: ControllerEnvironment) -> dict[Arm, int]:
    """Returns the basis points by arm from the traffic file."""
    routing = world.traffic.routing
    return {one: routing.weight_of(one) for one in (Arm.CANARY, Arm.STABLE, Arm.HOLDOUT)}


def dead_pid() -> int:
    """Returns the id of an exited process."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@contextmanager
def controlling(world: RunDirectoryEnvironment, *, after_s: float = 0.0) -> Iterator[None]:
    """Runs the controller loop in a thread with the real clock, starting ``after_s`` from now."""
    stop, wake = threading.Event(), threading.Event()
    world.clock = time.time  # type: ignore[assignment]
    world.restart()
    world.controlled()

    def run() -> None:
        time.sleep(after_s)
        world.controller.run(stop, wake, 0.05)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class CommandResult:
    """Result of a command."""

    code: int
    out: str
    err: str


def reelway(*words: object) -> CommandResult:
    """Runs a command in this process and maps errors to messages and exit codes as ``main`` does."""
    app = typer.Typer()
    rollout.register(app)
    drill.register(app)
    result = CliRunner().invoke(app, [str(word) for word in words])
    error = result.exception
    if isinstance(error, ReelwayError):
        return CommandResult(error.exit_code, result.stdout, f"{result.stderr}error: {error}")
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return CommandResult(result.exit_code, result.stdout, result.stderr)
