"""Every knob of training in one tree of dataclasses, with presets; refuses an unknown name or a wrong type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from reelway.pipelines.models.ranker import RankerConfig
from reelway.pipelines.models.two_tower import TwoTowerConfig
from reelway.platform.errors import ConfigError


@dataclass(frozen=True)
class LoopConfig:
    """How one model is fitted."""

    epochs: int = 3
    batch_size: int = 1024
    """Rows per step over all workers together, so that the number of workers doesn't change the step count."""
    lr: float = 2e-3
    weight_decay: float = 1e-4
    """Not applied to embeddings, norms and biases."""
    grad_clip: float = 1.0
    warmup_ratio: float = 0.05
    """Share of all steps over which the learning rate rises; it then falls along a cosine to ``final_lr_ratio``."""
    final_lr_ratio: float = 0.05
    max_steps_per_epoch: int | None = None
    """Stop an epoch early; the order differs per epoch, so that all rows are seen in time."""
    checkpoint_steps: int | None = None
    """Checkpoint within an epoch too, every so many steps; None: at the end of each epoch only."""


@dataclass(frozen=True)
class RetrievalData:
    """Which rows the two-tower learns from and what it is contrasted with."""

    uniform_negatives: int = 512
    """Videos drawn uniformly into each pool (per worker); as many as there are videos, or more: all of them."""
    log_q_power: float = 1.0
    """1: full log-Q correction; 0: none, which demotes popular videos."""
    label_smoothing: float = 0.0
    weight_cap: float = 3.0
    """A positive counts by its outcome weight, up to this."""
    recency_half_life_d: float | None = None
    """Halve a positive's weight for every so many days before the window's end; None: all count alike."""


@dataclass(frozen=True)
class TrainingConfig:
    """The whole of it; ``to_dict`` is what ``training.json`` records."""

    seed: int = 0
    train_fraction: float = 0.8
    """Events before this share of all events, by time, are trained on; the rest is for evaluation."""
    calibration_fraction: float = 0.05
    """The latest share of the training window that calibration is fitted on and the ranker never sees."""
    calibration_method: Literal["isotonic", "platt"] = "isotonic"
    sampled_negatives: int = 0
    """Videos per row that were available then but not shown, added to the ranker's rows with zero labels: for
    imported data that holds positives only."""
    ranker_holdout: float = 0.0
    """Above 0, the ranker is fitted on this latest share of the window, with similarities of a two-tower that has not
    seen it; the two-tower that is kept then learns from the whole window. Where there is little data a two-tower
    remembers its rows, and a ranker fitted on remembered similarities trusts them too much (stacked generalisation,
    Wolpert 1992). Costs a second two-tower; needs ``ranker.similarity_only``."""
    two_tower: TwoTowerConfig = field(default_factory=TwoTowerConfig)
    two_tower_loop: LoopConfig = field(default_factory=LoopConfig)
    retrieval: RetrievalData = field(default_factory=RetrievalData)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    ranker_loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=2, batch_size=2048, lr=3e-3))

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction <= 1:
            raise ConfigError(f"train_fraction is {self.train_fraction}, expected above 0 and at most 1")
        if not 0 <= self.calibration_fraction < 0.5:
            raise ConfigError(f"calibration_fraction is {self.calibration_fraction}, expected 0..0.5")
        if self.ranker_holdout and not self.calibration_fraction < self.ranker_holdout < 1:
            raise ConfigError(
                f"ranker_holdout is {self.ranker_holdout}, expected 0, or above calibration_fraction "
                f"({self.calibration_fraction}) and below 1: the ranker learns from what lies between the two"
            )
        if self.ranker_holdout and not self.ranker.similarity_only:
            raise ConfigError(
                "ranker_holdout is set and ranker.similarity_only is not: the coordinates of two two-towers mean "
                "different things, only their similarities compare; set ranker.similarity_only to true"
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The inverse of ``to_dict``; raises ConfigError on an unknown name or a wrong type."""
        built: TrainingConfig = _build(cls, values, "")
        return built


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        # a few positives per video: small batches for enough steps, and content must carry what ids cannot
        "two_tower": {"dim": 48, "layers": 1, "history_length": 30, "id_dropout": 0.4},
        "two_tower_loop": {"epochs": 6, "batch_size": 256},
        "ranker_loop": {"epochs": 2, "batch_size": 2048},
    },
    "ml-100k": {
        "calibration_fraction": 0.03,
        "sampled_negatives": 20,
        "ranker_holdout": 0.15,
        "two_tower": {"dim": 64, "layers": 1, "history_length": 50, "dropout": 0.2, "id_dropout": 0.05},
        "two_tower_loop": {"epochs": 20, "batch_size": 1024, "lr": 1e-3},
        "retrieval": {"uniform_negatives": 4096},
        "ranker": {"kind": "shared_bottom", "similarity_only": True, "dropout": 0.1},
        "ranker_loop": {"epochs": 3, "batch_size": 2048},
    },
}
"""``demo``: the simulator's 300,000 impressions on two cores in well under 90 s. ``ml-100k``: positives only."""


def load_config(
    preset: str = "demo", file: Path | None = None, overrides: Sequence[str] = (), **values: Any
) -> TrainingConfig:
    """A preset, then a YAML file's values, then ``a.b=value`` overrides, then keyword values (None: not given).

    Raises:
        ConfigError: unknown preset or name, or a value of the wrong type; the message names it.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}, expected one of {sorted(PRESETS)}")
    tree: dict[str, Any] = {}
    _merge(tree, PRESETS[preset])
    if file is not None:
        _merge(tree, _read_yaml(file))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '='; expected a.b=value, such as two_tower.dim=32")
        nested: Any = yaml.safe_load(text)
        for part in reversed(name.strip().split(".")):
            nested = {part: nested}
        _merge(tree, nested)
    _merge(tree, {name: value for name, value in values.items() if value is not None})
    return TrainingConfig.from_dict(tree)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read training configuration {file}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: saw {type(loaded).__name__}, expected a mapping such as 'two_tower: {{dim: 32}}'")
    return loaded


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, Mapping):
            inner = tree.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"training configuration: {name!r} is a value, saw a mapping {dict(value)!r}")
            _merge(inner, value)
        else:
            tree[name] = value


def _build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigError(
            f"training configuration: unknown name {where + unknown[0]!r}, expected among {sorted(hints)}"
        )
    try:
        return kind(**{name: _value(hints[name], value, where + name) for name, value in values.items()})
    except ValueError as error:
        raise ConfigError(f"training configuration: {error}") from error


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"training configuration: {name} is {value!r}, expected a mapping of its fields")
        return _build(hint, value, name + ".")
    if typing.get_origin(hint) is dict:
        return {str(key): float(number) for key, number in dict(value).items()}
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"training configuration: {name} is {value!r}, expected one of {list(choices)}")
        return value
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds and isinstance(value, bool):
        return value
    if int in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    if float in kinds and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as a word
            return float(value)
        except ValueError:
            pass
    expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    raise ConfigError(f"training configuration: {name} is {value!r}, expected {expected}")
