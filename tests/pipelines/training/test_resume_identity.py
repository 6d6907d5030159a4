"""An interrupted training resumes only if every value of its input is unchanged."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.training_row_fixtures import made_table, write_rows

from reelway.pipelines.training.config import TrainingConfig, load_config
from reelway.pipelines.training.fit import make_training_split
from reelway.pipelines.training.negatives import FIELDS, RankerRows, impression_rows
from reelway.pipelines.training.ray_train import INTERRUPTED_RETENTION_S, checkpoints_name, prune_interrupted
from reelway.pipelines.training.rows import TrainingRows, load_rows


@pytest.fixture
def config() -> TrainingConfig:
    return load_config("demo")


@pytest.fixture
def rows(tmp_path: Path) -> TrainingRows:
    return load_rows(write_rows(tmp_path / "rows.parquet", made_table(requests=30)), DIMENSIONS)


def name_of(rows: TrainingRows, config: TrainingConfig, learn: RankerRows | None = None) -> str:
    window = make_training_split(rows, config)
    return checkpoints_name(rows, learn or impression_rows(rows, window.training(rows)), window, config, 2)


def changed(values: np.ndarray) -> np.ndarray:
    other = values.copy()
    other.flat[0] = not other.flat[0] if other.dtype == np.bool_ else other.flat[0] + 1
    return other


def test_same_rows_read_again_resume(rows: TrainingRows, config: TrainingConfig, tmp_path: Path) -> None:
    again = load_rows(tmp_path / "rows.parquet", DIMENSIONS)
    assert name_of(again, config) == name_of(rows, config)


def test_one_changed_value_starts_a_new_training(rows: TrainingRows, config: TrainingConfig) -> None:
    learn = impression_rows(rows, make_training_split(rows, config).training(rows))
    names = {name_of(rows, config, learn)}
    variants = [replace(rows, **{name: changed(getattr(rows, name))}) for name in ("labels", "weight", "video_dense")]
    for part in ("viewers", "videos"):
        arrays = getattr(rows, part)
        variants += [
            replace(rows, **{part: replace(arrays, **{field.name: changed(values)})})
            for field in fields(arrays)
            if (values := getattr(arrays, field.name)).size
        ]
    names |= {name_of(variant, config, learn) for variant in variants}
    names |= {name_of(rows, config, replace(learn, **{name: changed(getattr(learn, name))})) for name in FIELDS}
    assert len(names) == 1 + len(variants) + len(FIELDS)


def test_checkpoints_of_older_interrupted_trainings_are_removed(tmp_path: Path) -> None:
    now_s = 1e9
    for name, age_s in (("fit-old", INTERRUPTED_RETENTION_S + 1), ("fit-new", 60.0), ("fit-own", 1e6), ("other", 1e6)):
        for folder in (tmp_path / name / "checkpoint_0", tmp_path / f"{name}.input"):
            folder.mkdir(parents=True)
            (folder / "state.pt").write_text("state")
        for path in [*tmp_path.glob(f"{name}*"), *tmp_path.glob(f"{name}*/**/*")]:
            os.utime(path, (now_s - age_s, now_s - age_s))
    os.utime(tmp_path / "fit-new", (1.0, 1.0))  # the newest file counts, not the folder
    assert prune_interrupted(tmp_path, "fit-own", now_s) == ["fit-old", "fit-old.input"]
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"fit-new", "fit-own", "other"}
