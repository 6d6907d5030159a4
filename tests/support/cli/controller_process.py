"""The real local controller with its webhook, as a process; traffic and evidence are files.

``python -m tests.support.cli.controller_process RUN``; ``RUN/evidence.json`` holds the arguments of
``SyntheticEvidence``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.cli.rollout_fixtures import SyntheticEvidence
from tests.support.rollout.controller_environment import FileBackend

from reelway.platform.rollout.control import local_controller
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import RolloutState
from reelway.platform.run_directory import RunDirectory

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
    local_controller.ServeRestBackend = RunDirectoryBackend  # type: ignore[assignment,misc]
    local_controller.evidence_source = lambda run, *_, **__: FileEvidence(run.path / EVIDENCE)  # type: ignore[assignment]
    local_controller.run_controller(local_controller.ControllerSettings(run=run, interval_s=0.1))


if __name__ == "__main__":
    main()
