"""The training configuration: pydantic models, presets, and how a preset, a file and single values are merged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reelway.pipelines.models.ranker import RankerConfig
from reelway.pipelines.models.two_tower import TwoTowerConfig
from reelway.platform.errors import ConfigError
from reelway.platform.validation_errors import explain_problem


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoopConfig(_Section):
    """How one model is fitted."""

    epochs: Annotated[int, Field(ge=1)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 1024
    """Rows per step over all workers together, so that the number of workers does not change the number of steps."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Not applied to embeddings, norms and biases."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of all steps over which the learning rate rises; it then falls along a cosine to ``final_lr_ratio``."""
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    max_steps_per_epoch: Annotated[int | None, Field(ge=1)] = None
    """Steps after which an epoch ends early. Each epoch has another order, so later epochs reach the other rows."""
    checkpoint_steps: Annotated[int | None, Field(ge=1)] = None
    """Steps between two checkpoints within an epoch; None checkpoints at the end of each epoch only."""


class RetrievalDataConfig(_Section):
    """Rows and negatives of the two-tower."""

    uniform_negatives: Annotated[int, Field(ge=0)] = 512
    """Videos drawn uniformly into each worker's pool; at or above the number of videos, the pool holds all of them."""
    log_q_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """1 applies the full log-Q correction; 0 applies none, which demotes popular videos."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_cap: Annotated[float, Field(gt=0)] = 3.0
    """Upper limit of a positive's outcome weight."""
    recency_half_life_d: Annotated[float | None, Field(gt=0)] = None
    """Days before the window's end after which a positive counts half; None weights all positives alike."""


class TrainingConfig(_Section):
    """All settings of training; ``training.json`` records them."""

    seed: int = 0
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of all events, by time, that is trained on; the later events are for evaluation."""
    calibration_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """Latest share of the training window: calibration is fitted on it, the ranker is not."""
    calibration_method: Literal["isotonic", "platt"] = "isotonic"
    sampled_negatives: Annotated[int, Field(ge=0)] = 0
    """Videos per row that were available at its time but not shown.

    They join the ranker's rows with zero labels; for imported data that holds positives only.
    """
    ranker_holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Latest share of the window that the ranker is fitted on; 0 fits it on the whole window.

    Above 0, the ranker learns from the similarities of a two-tower that has not seen these rows (stacked
    generalisation, Wolpert 1992). On little data a two-tower memorises its rows, and a ranker that is fitted on
    memorised similarities trusts them too much. The released two-tower learns from the whole window. The setting costs
    a second two-tower and needs ``ranker.similarity_only``.
    """
    two_tower: TwoTowerConfig = TwoTowerConfig()
    two_tower_loop: LoopConfig = LoopConfig()
    retrieval: RetrievalDataConfig = RetrievalDataConfig()
    ranker: RankerConfig = RankerConfig()
    ranker_loop: LoopConfig = LoopConfig(epochs=2, batch_size=2048, lr=3e-3)

    @model_validator(mode="after")
    def _check_holdout(self) -> Self:
        if not self.ranker_holdout:
            return self
        if self.ranker_holdout <= self.calibration_fraction:
            raise ValueError(
                f"ranker_holdout is {self.ranker_holdout}, expected 0 or a value above calibration_fraction "
                f"({self.calibration_fraction}); the ranker learns from the rows between the two"
            )
        if not self.ranker.similarity_only:
            raise ValueError(
                "ranker_holdout is set but ranker.similarity_only is false; set ranker.similarity_only to true, "
                "because the coordinates of two two-towers are not comparable, only their similarities are"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        # few positives per video: small batches give enough steps, and content must carry what ids cannot
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
"""``demo``: the simulator's 300,000 impressions on two cores in less than 90 s. ``ml-100k``: positives only."""


class _Yaml(yaml.SafeLoader):
    """YAML loader that reads 1e-3 as a number, as in YAML 1.2 and JSON; YAML 1.1 reads it as text."""


_Yaml.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(
    preset: str = "demo", file: Path | None = None, overrides: Sequence[str] = (), **values: Any
) -> TrainingConfig:
    """Merges a preset, a YAML file, ``a.b=value`` overrides and keyword values, and validates the result.

    Later sources override earlier ones. A keyword value of None counts as not given.

    Raises:
        ConfigError: if the preset or a name is unknown, or a value is of the wrong type or out of range.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}, expected one of {sorted(PRESETS)}")
    tree = dict(PRESETS[preset])
    if file is not None:
        tree = _merged(tree, _read_yaml(file))
    for override in overrides:
        tree = _merged(tree, _parse_override(override))
    tree = _merged(tree, {name: value for name, value in values.items() if value is not None})
    try:
        return TrainingConfig.model_validate(tree)
    except ValidationError as error:
        lines = [explain_problem(TrainingConfig, p, "training configuration") for p in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(file.read_text(), _Yaml)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read training configuration {file}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: saw {type(loaded).__name__}, expected a mapping such as 'two_tower: {{dim: 32}}'")
    return loaded


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no '='; expected a.b=value, such as two_tower.dim=32")
    try:
        nested: Any = yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    for part in reversed(name.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merged(tree: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``tree`` updated with ``more``; mappings in both are merged."""
    merged = dict(tree)
    for name, value in more.items():
        before = merged.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged
