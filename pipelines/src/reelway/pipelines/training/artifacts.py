"""Files of a finished training in ``<run>/models``: arrays and JSON, no pickle.

::

    models/two_tower.npz + two_tower.json     weights; configuration and feature dimensions
    models/ranker.npz    + ranker.json
    models/calibration.json
    models/training.json                      TrainingInfo: window, seed, config, loss curves, base rates, notes
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from reelway.pipelines.models.ranker import Ranker, RankerConfig
from reelway.pipelines.models.two_tower import TwoTower, TwoTowerConfig
from reelway.platform.atomic_files import atomic_file, write_json
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import MalformedFileError, TrainingError

CALIBRATION_FILE: Final = "calibration.json"
TRAINING_INFO_FILE: Final = "training.json"


@dataclass(frozen=True)
class TrainingInfo:
    """Record of a training: data, configuration, loss curves and calibration."""

    seed: int
    window_start_s: float
    """Events of the training window: [start, end), Unix seconds."""
    window_end_s: float
    """End of training, start of evaluation. Infinity (null in JSON) if all events were trained on."""
    calibration_start_s: float
    """The ranker learned from events before this; the rest of the window is for calibration."""
    config: dict[str, Any]
    curves: dict[str, list[dict[str, float]]]
    """Stage -> one mapping of metrics per epoch."""
    base_rates: dict[str, float]
    """Mean label of each head in the window; seconds for ``watch_s``."""
    calibration: list[dict[str, Any]]
    """One ``HeadReport`` per binary head."""
    notes: list[str]
    """Remarks for the ML engineer, such as a head whose labels have one class only."""
    rows: dict[str, int]
    elapsed_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; infinity becomes None, because JSON has no infinity."""
        plain = dataclasses.asdict(self)
        for name in ("window_end_s", "calibration_start_s"):
            if not np.isfinite(plain[name]):
                plain[name] = None
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingInfo:
        ends = {name: np.inf for name in ("window_end_s", "calibration_start_s") if values[name] is None}
        return cls(**{**values, **ends})


@dataclass(frozen=True)
class TrainedModels:
    """Both models in evaluation mode on the CPU, with calibration and training record."""

    two_tower: TwoTower
    ranker: Ranker
    calibration: Calibration
    info: TrainingInfo

    @property
    def dimensions(self) -> FeatureDimensions:
        """Widths of the features that both models were trained on."""
        return self.two_tower.dimensions


def save_models(models: TrainedModels, folder: Path) -> None:
    """Writes all files, each atomically and ``training.json`` last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINING_INFO_FILE).unlink(missing_ok=True)
    dimensions = dataclasses.asdict(models.dimensions)
    tower = {"config": models.two_tower.config.model_dump(), "dimensions": dimensions}
    _save(models.two_tower, tower, folder, "two_tower")
    ranker_config = {
        "config": models.ranker.config.model_dump(),
        "dimensions": dimensions,
        "embedding_dim": models.ranker.embedding_dim,
    }
    _save(models.ranker, ranker_config, folder, "ranker")
    write_json(folder / CALIBRATION_FILE, models.calibration.model_dump(mode="json"))
    write_json(folder / TRAINING_INFO_FILE, models.info.to_dict())


def load_models(models_dir: Path) -> TrainedModels:
    """Reads the files of ``save_models``.

    Raises:
        TrainingError: if the folder holds no finished training.
        MalformedFileError: if a file is damaged or does not fit its configuration.
    """
    if not (models_dir / TRAINING_INFO_FILE).exists():
        raise TrainingError(f"{models_dir}: no {TRAINING_INFO_FILE}, so no finished training; run `reelway train`")
    with _described_by(models_dir / "two_tower.json") as about:
        two_tower = TwoTower(TwoTowerConfig(**about["config"]), FeatureDimensions(**about["dimensions"]))
    _load(two_tower, models_dir / "two_tower.npz")
    with _described_by(models_dir / "ranker.json") as about:
        dimensions = FeatureDimensions(**about["dimensions"])
        ranker = Ranker(RankerConfig(**about["config"]), about["embedding_dim"], dimensions)
    _load(ranker, models_dir / "ranker.npz")
    calibration = Calibration.model_validate(_read_json(models_dir / CALIBRATION_FILE))
    info = TrainingInfo.from_dict(_read_json(models_dir / TRAINING_INFO_FILE))
    return TrainedModels(two_tower, ranker, calibration, info)


def _save(model: nn.Module, about: dict[str, Any], folder: Path, name: str) -> None:
    write_json(folder / f"{name}.json", about)
    state = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
    with atomic_file(folder / f"{name}.npz") as aside, aside.open("wb") as handle:
        np.savez(handle, **state, allow_pickle=False)


def _load(model: nn.Module, path: Path) -> None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            state = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
        model.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise MalformedFileError(
            path, "the weights of the configuration beside it; train again", seen=str(error)
        ) from error
    model.eval()


@contextmanager
def _described_by(path: Path) -> Iterator[dict[str, Any]]:
    """Builds an object from the JSON file of a model's configuration.

    Raises:
        MalformedFileError: if the file is damaged or its values are invalid.
    """
    about = _read_json(path)
    try:
        yield about
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedFileError(path, "a model's configuration; train again", seen=str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MalformedFileError(path, "JSON written by `reelway train`", seen=str(error)) from error
    return loaded
