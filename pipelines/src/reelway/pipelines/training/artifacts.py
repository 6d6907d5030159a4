"""What ``reelway train`` leaves behind, and how the next steps read it: arrays and JSON, no pickle.

::

    models/two_tower.npz + two_tower.json     weights, and the configuration that rebuilds the model
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
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.durable import whole_file, write_json
from reelway.platform.errors import MalformedFileError, TrainingError

CALIBRATION: Final = "calibration.json"
INFO: Final = "training.json"


@dataclass(frozen=True)
class TrainingInfo:
    """What was trained on what, and how it went."""

    seed: int
    window_start_s: float
    """Events of the training window: [start, end), Unix seconds."""
    window_end_s: float
    """The cut: evaluation starts here. Infinity (null in JSON) when all events were trained on."""
    calibration_start_s: float
    """The ranker saw events before this only; the rest of the window fitted the calibration."""
    config: dict[str, Any]
    curves: dict[str, list[dict[str, float]]]
    """Stage -> one mapping of metrics per epoch."""
    base_rates: dict[str, float]
    """Mean of each head's label in the window; seconds for ``watch_s``."""
    calibration: list[dict[str, Any]]
    """One ``HeadReport`` per binary head."""
    notes: list[str]
    """What a person should know, such as a head that had one class only."""
    rows: dict[str, int]
    elapsed_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinity becomes None, which JSON can say."""
        plain = dataclasses.asdict(self)
        for name in ("window_end_s", "calibration_start_s"):
            if not np.isfinite(plain[name]):
                plain[name] = None
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingInfo:
        """The inverse of ``to_dict``."""
        ends = {name: np.inf for name in ("window_end_s", "calibration_start_s") if values[name] is None}
        return cls(**{**values, **ends})


@dataclass(frozen=True)
class TrainedModels:
    """The models in evaluation mode, on the CPU."""

    two_tower: TwoTower
    ranker: Ranker
    calibration: Calibration
    info: TrainingInfo

    @property
    def dimensions(self) -> FeatureDimensions:
        """Widths of the features that both models were trained on."""
        return self.two_tower.dimensions


def save_models(models: TrainedModels, folder: Path) -> None:
    """Write everything; each file is whole or absent, and ``training.json`` is last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO).unlink(missing_ok=True)
    dimensions = dataclasses.asdict(models.dimensions)
    tower = {"config": models.two_tower.config.model_dump(), "dimensions": dimensions}
    _save(models.two_tower, tower, folder, "two_tower")
    ranker_config = {
        "config": models.ranker.config.model_dump(),
        "dimensions": dimensions,
        "embedding_dim": models.ranker.embedding_dim,
    }
    _save(models.ranker, ranker_config, folder, "ranker")
    write_json(folder / CALIBRATION, models.calibration.model_dump(mode="json"))
    write_json(folder / INFO, models.info.to_dict())


def load_models(models_dir: Path) -> TrainedModels:
    """What ``save_models`` wrote.

    Raises:
        TrainingError: nothing was trained here.
        MalformedFileError: a file is damaged or of another configuration.
    """
    if not (models_dir / INFO).exists():
        raise TrainingError(f"{models_dir}: no {INFO}, so no finished training; run `reelway train` first")
    with _described_by(models_dir / "two_tower.json") as about:
        two_tower = TwoTower(TwoTowerConfig(**about["config"]), FeatureDimensions(**about["dimensions"]))
    _load(two_tower, models_dir / "two_tower.npz")
    with _described_by(models_dir / "ranker.json") as about:
        dimensions = FeatureDimensions(**about["dimensions"])
        ranker = Ranker(RankerConfig(**about["config"]), about["embedding_dim"], dimensions)
    _load(ranker, models_dir / "ranker.npz")
    calibration = Calibration.model_validate(_read_json(models_dir / CALIBRATION))
    info = TrainingInfo.from_dict(_read_json(models_dir / INFO))
    return TrainedModels(two_tower, ranker, calibration, info)


def _save(model: nn.Module, about: dict[str, Any], folder: Path, name: str) -> None:
    write_json(folder / f"{name}.json", about)
    state = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
    with whole_file(folder / f"{name}.npz") as aside, aside.open("wb") as handle:
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
    """The JSON beside a model's weights; what cannot be built from it is a ``MalformedFileError``."""
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
