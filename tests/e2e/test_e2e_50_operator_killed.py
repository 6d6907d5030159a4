"""The operator's pod is killed during rollouts, and its successor completes them.

tests/cluster/test_operator.py kills a process at every recorded instruction. This scene kills the pod five times over
the real RayService, at random times from a printed seed.
"""

from __future__ import annotations

import random
import time

import pytest
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.flow import Flow
from tests.support.e2e.rollouts import begin, phase, until_phase
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
KILLS = 5
LONGEST_S = 12.0
"""Approximate duration in seconds of a rollout between two warm releases."""


def test_rollouts_complete_after_operator_kills(flow: Flow) -> None:
    seed = random.SystemRandom().randrange(10_000)
    chance = random.Random(seed)
    others = [flow.live, flow.releases.ids[1] if flow.live != flow.releases.ids[1] else flow.releases.ids[0]]
    met: list[str] = []
    with expect_no_disruption(flow, f"operator killed {KILLS} times (seed {seed})", "serving"):
        for number in range(KILLS):
            release, name = others[(number + 1) % 2], f"killed-{number}"
            begin(flow.kubectl, name, release, force=True)
            _pass(chance.uniform(0.2, LONGEST_S))
            met.append(phase(flow.kubectl, name))
            _kill(flow)
            until_phase(flow.kubectl, name, "Promoted")
            flow.live = release
    moment = flow.load.now()
    flow.load.until_answered_by(flow.live, since=moment, within_s=10, count=10)
    print(f"seed {seed}: killed while {', '.join(met)}")
    flow.note("operator killed at random moments of a rollout, converged", KILLS, "rollouts", f"{KILLS}", True)


def _pass(seconds: float) -> None:
    """Sleeps: the random time of the kill is the test's input."""
    time.sleep(seconds)


def _kill(flow: Flow) -> None:
    before = flow.installation.pods("operator")
    flow.kubectl.run("delete", "pod", *before, "--grace-period=0", "--force", "--wait=true")
    until("there is another operator", lambda: flow.installation.pods("operator").keys() - before.keys(), 60)
