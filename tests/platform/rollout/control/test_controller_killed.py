"""A controller that is killed and restarted reaches the same end as one that was never killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from tests.support.rollout.killed_controller import STORIES, play

from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore

_FORKS = multiprocessing.get_context("forkserver")
CLOCKS = {"changed_at", "tick_at", "evidence_at", "phase_s", "held_insufficient_s", "held_telemetry_s"}
"""Fields that a kill may change, because it costs time. Nothing else may differ."""


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    """Forks children from a process that has imported everything, so that a kill costs milliseconds."""
    _FORKS.set_forkserver_preload(["tests.support.rollout.killed_controller"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path.cwd()))  # Python 3.11's fork server does not inherit its parent's path
        forkserver.ensure_running()


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder in memory: a killed process loses nothing that it wrote, and syncs are fast."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def killed(folder: Path, story: str, die_at: int) -> bool:
    """Runs the scenario in a child process. Returns whether the child killed itself."""
    child = _FORKS.Process(target=play, args=(folder, story, die_at))
    child.start()
    child.join(60)
    return child.exitcode == -signal.SIGKILL


def end_of(folder: Path) -> dict[str, Any]:
    store = SqliteRolloutStore(folder / "state.db")
    state = store.all()[0].state.model_dump(mode="json", exclude=CLOCKS)
    history = [(entry.action, entry.phase_before, entry.phase, entry.canary_bp) for entry in store.history()]
    store.close()
    return {"state": state, "history": history, "traffic": json.loads((folder / "traffic.json").read_text())}


@pytest.mark.parametrize("story", sorted(STORIES))
def test_controller_killed_at_any_point_reaches_the_same_end(
    in_memory: Path, story: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = in_memory / "whole"
    uninterrupted.mkdir()
    play(uninterrupted, story, 0)
    points, expected = int((uninterrupted / "points").read_text()), end_of(uninterrupted)
    for die_at in range(1, points + 1):
        folder = in_memory / str(die_at)
        folder.mkdir()
        assert killed(folder, story, die_at)
        play(folder, story, 0)
        assert end_of(folder) == expected, f"killed at point {die_at} of {points}"
    with capsys.disabled():
        print(f"\n{story}: killed at each of {points} points, the same end every time")
    assert points >= 20
