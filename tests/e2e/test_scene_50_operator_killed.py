"""The operator's pod is killed in the middle of rollouts, without notice: the next one goes on where it was.

Every instruction of a rollout is tried in tests/cluster/test_operator.py, with twenty kills of a process. Here it is
five kills of a pod, on the real RayService, at moments drawn from a seed that is printed.
"""

from __future__ import annotations

import random
import time

import pytest
from tests.e2e.conftest import Flow
from tests.e2e.rollouts import begin, phase, until_phase
from tests.e2e.waiting import until
from tests.e2e.watched import unnoticed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
KILLS = 5
LONGEST_S = 12.0
"""A rollout between releases that are both warm takes about so long."""


def test_a_killed_operator_is_followed_by_one_that_converges(flow: Flow) -> None:
    seed = random.SystemRandom().randrange(10_000)
    chance = random.Random(seed)
    others = [flow.live, flow.releases.ids[1] if flow.live != flow.releases.ids[1] else flow.releases.ids[0]]
    met: list[str] = []
    with unnoticed(flow, f"operator killed {KILLS} times (seed {seed})", "serving"):
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
    """The moment of the kill is what is drawn, so it is waited for by the clock."""
    time.sleep(seconds)


def _kill(flow: Flow) -> None:
    before = flow.installation.pods("operator")
    flow.kubectl.run("delete", "pod", *before, "--grace-period=0", "--force", "--wait=true")
    until("there is another operator", lambda: flow.installation.pods("operator").keys() - before.keys(), 60)
