"""Checkpoints as files in one folder, written atomically; the newest two are kept. Used without Ray and by tests."""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path

import torch

from reelway.pipelines.training.loop import State, current_worker
from reelway.platform.atomic_files import atomic_file
from reelway.platform.errors import TrainingError

_log = logging.getLogger(__name__)


def write_state(state: State, path: Path) -> None:
    """Writes tensors and plain values only, so that reading executes no code."""
    with atomic_file(path) as aside:
        torch.save(state, aside)


def read_state(path: Path) -> State:
    """Reads a file of ``write_state``.

    Raises:
        TrainingError: if the file is damaged, or holds more than tensors and plain values.
    """
    if not zipfile.is_zipfile(path):  # torch would try a truncated file as its older pickle format
        raise TrainingError(f"{path}: not a readable checkpoint (truncated or missing); remove it and train again")
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path}: not a readable checkpoint ({error}); remove it and train again") from error
    return state


class FileCheckpoints:
    """``<folder>/checkpoint-<n>.pt``; worker 0 writes, all workers read."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """Adds a checkpoint and removes all but the newest ``keep``."""
        del metrics
        if current_worker().rank != 0:
            return
        files = self._files()
        number = int(files[-1].stem.split("-")[1]) + 1 if files else 0
        write_state(state, self.folder / f"checkpoint-{number:06d}.pt")
        for old in self._files()[: -self.keep]:
            old.unlink()

    def load(self) -> State | None:
        """Returns the newest checkpoint, or None."""
        files = self._files()
        if not files:
            return None
        _log.info("resuming from checkpoint: %s", files[-1])
        return read_state(files[-1])
