"""The real controller in a process of its own, webhook and all; the traffic is a file, the evidence is told by one.

``python -m tests.platform.cli.controller_process RUN``; ``RUN/evidence.json`` holds the arguments of ``SeenEvidence``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.platform.cli.made_rollouts import SeenEvidence
from tests.platform.rollout.made_world import FileBackend

from reelway.platform.rollout.control import controller_service
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import RolloutState
from reelway.platform.runs import RunDirectory

EVIDENCE = "evidence.json"


class RunBackend(FileBackend):
    """Traffic in the run directory."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run.path / "rollout" / "traffic.json")

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class ToldEvidence:
    """What the file says now."""

    path: Path

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        return SeenEvidence(**json.loads(self.path.read_text())).fetch(policy, state, now)


def main() -> None:
    run = Path(sys.argv[1])
    controller_service.ServeRestBackend = RunBackend  # type: ignore[assignment,misc]
    controller_service.evidence_source = lambda run, *_, **__: ToldEvidence(run.path / EVIDENCE)  # type: ignore[assignment]
    controller_service.run_controller(controller_service.ControllerSettings(run=run, interval_s=0.1))


if __name__ == "__main__":
    main()
