"""The operator's pod is killed during rollouts, and its successor completes them.

tests/cluster/test_operator.py kills a process at every recorded instruction. This module kills the pod five times over
the real RayService, at random times from a printed seed.
"""

from __future__ import annotations

import random
import time

import pytest
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.rollouts import begin, phase, wait_until_phase
from tests.support.e2e.shared_installation import SharedInstallation
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
KILLS = 5
LONGEST_S = 12.0
"""Approximate duration in seconds of a rollout between two warm releases."""


def test_rollouts_complete_after_operator_kills(shared: SharedInstallation) -> None:
    seed = random.SystemRandom().randrange(10_000)
    chance = random.Random(seed)
    others = [shared.live, shared.releases.ids[1] if shared.live != shared.releases.ids[1] else shared.releases.ids[0]]
    phases: list[str] = []
    with expect_no_disruption(shared, f"operator killed {KILLS} times (seed {seed})", "serving"):
        for number in range(KILLS):
            release, name = others[(number + 1) % 2], f"killed-{number}"
            begin(shared.kubectl, name, release, force=True)
            _sleep(chance.uniform(0.2, LONGEST_S))
            phases.append(phase(shared.kubectl, name))
            _kill(shared)
            wait_until_phase(shared.kubectl, name, "Promoted")
            shared.live = release
    moment = shared.load.now()
    shared.load.wait_until_answered_by(shared.live, since=moment, within_s=10, count=10)
    print(f"seed {seed}: killed while {', '.join(phases)}")
    shared.note("operator killed at random moments of a rollout, converged", KILLS, "rollouts", f"{KILLS}", True)


def _sleep(seconds: float) -> None:
    """The random time of the kill is the input of the test, so no condition is awaited."""
    time.sleep(seconds)


def _kill(shared: SharedInstallation) -> None:
    before = shared.installation.pods("operator")
    shared.kubectl.run("delete", "pod", *before, "--grace-period=0", "--force", "--wait=true")
    until("the operator has a new pod", lambda: shared.installation.pods("operator").keys() - before.keys(), 60)
