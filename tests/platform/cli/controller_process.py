"""The real local controller with its webhook, as a process; traffic and evidence are files.

``python -m tests.platform.cli.controller_process RUN``; ``RUN/evidence.json`` holds the arguments of ``SeenEvidence``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.platform.cli.made_rollouts import SyntheticEvidence
from tests.platform.rollout.made_world import FileBackend

from reelway.platform.rollout.control import controller_service
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import RolloutState
from reelway.platform.runs import RunDirectory

EVIDENCE = "evidence.json"


class RunDirectoryBackend(FileBackend):
    """Traffic in a file of the run directory."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run.path / "rollout" / "traffic.json")

    def close(self) -> None:
        """Does nothing: there is no connection."""


@dataclass
class FileEvidence:
    """Evidence from a file that is read on every fetch."""

    path: Path

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        return SyntheticEvidence(**json.loads(self.path.read_text())).fetch(policy, state, now)


def main() -> None:
    run = Path(sys.argv[1])
    controller_service.ServeRestBackend = RunDirectoryBackend  # type: ignore[assignment,misc]
    controller_service.evidence_source = lambda run, *_, **__: FileEvidence(run.path / EVIDENCE)  # type: ignore[assignment]
    controller_service.run_controller(controller_service.ControllerSettings(run=run, interval_s=0.1))


if __name__ == "__main__":
    main()
