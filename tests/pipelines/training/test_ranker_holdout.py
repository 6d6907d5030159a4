"""The ranker holdout: the ranker learns from rows that its two-tower has not seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.timestamped_features import timestamped_features as as_of
from tests.support.pipelines.training_row_fixtures import made_table, write_rows

from reelway.pipelines.training.config import TrainingConfig, load_config
from reelway.pipelines.training.fit import FittedModels, TrainingSplit, fit, fitted_from, make_training_split
from reelway.pipelines.training.loop import State
from reelway.pipelines.training.rows import TrainingRows, load_rows
from reelway.pipelines.training.train_run import ranker_rows_of
from reelway.platform.errors import ConfigError, EmptyDatasetError

HELD_OUT = (
    "two_tower.dim=16", "two_tower.history_length=10", "two_tower_loop.epochs=1", "ranker_loop.epochs=1",
    "ranker.kind=shared_bottom", "calibration_fraction=0.1", "ranker_holdout=0.3", "ranker.similarity_only=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TrainingRows:
    return load_rows(write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", made_table(requests=200)), DIMENSIONS)


@pytest.fixture(scope="module")
def config() -> TrainingConfig:
    return load_config("demo", overrides=HELD_OUT)


class InMemoryCheckpoints:
    """Checkpoints in memory."""

    state: State | None = None

    def save(self, state: State, _metrics: dict[str, float]) -> None:
        self.state = state

    def load(self) -> State | None:
        return None


def fitted(rows: TrainingRows, config: TrainingConfig, checkpoints: InMemoryCheckpoints | None = None) -> FittedModels:
    window = make_training_split(rows, config)
    candidates = ranker_rows_of(rows, window, config, as_of)
    learn = candidates.select(candidates.event_time_s < window.calibration_s)
    return fit(rows, learn, window, config, checkpoints=checkpoints)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    first_weights, second_weights = weights(first), weights(second)
    return all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)


def test_window_is_split_between_tower_ranker_and_calibration(rows, config):
    window = make_training_split(rows, config)
    inside = window.training(rows)
    shares = [len(rows.between(start, window.cut_s)) / len(inside) for start in (window.ranker_s, window.calibration_s)]
    assert shares == pytest.approx([0.3, 0.1], abs=0.02)
    candidates = ranker_rows_of(rows, window, config, as_of)
    assert candidates.event_time_s.min() >= window.ranker_s


def test_ranker_tower_does_not_depend_on_the_rankers_rows(rows, config):
    window = make_training_split(rows, config)
    late = rows.event_time_s >= window.ranker_s
    changed_rows = np.where(late, (rows.video_row + 7) % len(rows.video_ids), rows.video_row).astype(np.int32)
    changed = dataclasses.replace(rows, video_row=changed_rows)
    before, after = fitted(rows, config), fitted(changed, config)
    assert same(before.ranker_tower, after.ranker_tower)
    assert not same(before.two_tower, after.two_tower)
    assert not same(before.two_tower, before.ranker_tower)


def test_training_without_a_holdout_has_one_tower(rows):
    config = load_config("demo", overrides=[*HELD_OUT[:6]])
    models = fitted(rows, config)
    assert models.ranker_tower is models.two_tower
    assert make_training_split(rows, config).holds_out is False


def test_finished_checkpoint_restores_all_three_models(rows, config):
    checkpoints = InMemoryCheckpoints()
    models = fitted(rows, config, checkpoints)
    assert checkpoints.state is not None
    again = fitted_from(checkpoints.state, config, DIMENSIONS)
    for name in ("two_tower", "ranker", "ranker_tower"):
        assert same(getattr(models, name), getattr(again, name)), name


def test_held_out_rows_have_the_negatives_of_the_whole_window(rows, config):
    with_negatives = config.model_copy(update={"sampled_negatives": 3})
    window = make_training_split(rows, with_negatives)
    late = ranker_rows_of(rows, window, with_negatives, as_of)
    all_rows = ranker_rows_of(rows, TrainingSplit(window.cut_s, window.calibration_s), with_negatives, as_of)
    expected = all_rows.select(all_rows.event_time_s >= window.ranker_s)
    np.testing.assert_array_equal(late.video_row, expected.video_row)
    np.testing.assert_array_equal(late.video_dense, expected.video_dense)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ranker_holdout=0.3"], "similarity_only"),
        (["ranker_holdout=0.05", "ranker.similarity_only=true", "calibration_fraction=0.1"], "calibration_fraction"),
        (["ranker_holdout=1.2", "ranker.similarity_only=true"], "ranker_holdout: saw 1.2, expected less than 1"),
    ],
)
def test_config_rejects_an_impossible_holdout(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("demo", overrides=overrides)


def test_split_rejects_too_few_rows_for_a_holdout(tmp_path: Path, config):
    few = load_rows(write_rows(tmp_path / "rows.parquet", made_table(requests=1, slate=2)), DIMENSIONS)
    with pytest.raises(EmptyDatasetError, match="ranker_holdout"):
        make_training_split(few, config.model_copy(update={"train_fraction": 1.0}))
