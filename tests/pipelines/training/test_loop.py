"""The training loop: learning, resuming, and its errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.training_row_fixtures import made_table, write_rows
from torch import Tensor

from reelway.pipelines.models.losses import RetrievalObjective
from reelway.pipelines.models.two_tower import TwoTower, TwoTowerConfig
from reelway.pipelines.training.batches import RetrievalBatches
from reelway.pipelines.training.checkpoint_files import FileCheckpoints
from reelway.pipelines.training.config import LoopConfig, RetrievalDataConfig
from reelway.pipelines.training.loop import EpochReport, train
from reelway.pipelines.training.rows import TrainingRows, load_rows
from reelway.platform.errors import TrainingError

SHORT = dataclasses.replace(DIMENSIONS, history_length=10)
LOOP = LoopConfig(epochs=3, batch_size=64, lr=3e-3, checkpoint_steps=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TrainingRows:
    return load_rows(write_rows(tmp_path_factory.mktemp("rows") / "r.parquet", made_table()), SHORT)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_objective(rows: TrainingRows) -> RetrievalObjective:
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(dim=16, history_length=10), SHORT)
    model.ids.mark_known(torch.from_numpy(rows.videos.video_codes.astype(np.int64)))
    return RetrievalObjective(model)


def new_batches(rows: TrainingRows, loop: LoopConfig = LOOP) -> RetrievalBatches:
    return RetrievalBatches(rows, np.arange(len(rows)), RetrievalDataConfig(uniform_negatives=16), loop, seed=0)


class InjectedFailureError(Exception):
    pass


class FailingBatches:
    """Batches that raise once, at one step."""

    def __init__(self, batches: RetrievalBatches, epoch: int, step: int) -> None:
        self.inner, self.at, self.steps = batches, (epoch, step), batches.steps

    def batch(self, epoch: int, step: int) -> dict[str, Tensor]:
        if (epoch, step) == self.at:
            raise InjectedFailureError
        return self.inner.batch(epoch, step)


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (1, 3), (2, 5)])
def test_resumed_run_equals_an_uninterrupted_run(rows: TrainingRows, tmp_path: Path, cut: tuple[int, int]) -> None:
    straight = new_objective(rows)
    straight_curve = train(straight, new_batches(rows), LOOP, seed=7, stage="two_tower")

    checkpoints = FileCheckpoints(tmp_path)
    with pytest.raises(InjectedFailureError):
        train(
            new_objective(rows), FailingBatches(new_batches(rows), *cut), LOOP,
            seed=7, stage="two_tower", checkpoints=checkpoints,
        )  # fmt: skip
    resumed = new_objective(rows)
    with torch.no_grad():
        resumed.model.ids.table.weight.zero_()  # the initial weights must not matter
    if cut == (0, 0):  # no checkpoint yet: the run starts again
        resumed = new_objective(rows)
    curve = train(resumed, new_batches(rows), LOOP, seed=7, stage="two_tower", checkpoints=checkpoints)
    assert curve == straight_curve
    assert same_state(resumed, straight)


def test_another_seed_gives_another_model(rows: TrainingRows) -> None:
    loop = LOOP.model_copy(update={"epochs": 1})
    first, second = new_objective(rows), new_objective(rows)
    train(first, new_batches(rows), loop, seed=7, stage="two_tower")
    train(second, new_batches(rows), loop, seed=8, stage="two_tower")
    assert not same_state(first, second)


def test_loop_learns_which_video_follows_which(rows: TrainingRows) -> None:
    loop = LoopConfig(epochs=30, batch_size=64, lr=5e-3)
    reports: list[EpochReport] = []
    curve = train(
        new_objective(rows), new_batches(rows, loop), loop, seed=0, stage="two_tower", on_epoch=reports.append
    )
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert curve[-1]["top1"] > 0.35  # chance is about 1/50
    assert [report.epoch for report in reports] == list(range(30))
    assert reports[-1].metrics == curve[-1]


def test_loop_stops_at_a_loss_that_is_not_finite(rows: TrainingRows) -> None:
    objective = new_objective(rows)
    with torch.no_grad():
        objective.model.viewer_tower.out.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match="two_tower: epoch 1 ended with"):
        train(objective, new_batches(rows), LOOP, seed=0, stage="two_tower")


def test_loop_rejects_a_checkpoint_of_another_model(rows: TrainingRows, tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    loop = LOOP.model_copy(update={"epochs": 1})
    train(new_objective(rows), new_batches(rows), loop, seed=0, stage="two_tower", checkpoints=checkpoints)
    other = RetrievalObjective(TwoTower(TwoTowerConfig(dim=32), SHORT))
    with pytest.raises(TrainingError, match="does not fit the model"):
        train(other, new_batches(rows), loop, seed=0, stage="two_tower", checkpoints=checkpoints)
    with pytest.raises(TrainingError, match="of stage 'two_tower'"):
        train(new_objective(rows), new_batches(rows), loop, seed=0, stage="ranker", checkpoints=checkpoints)


def test_loop_preserves_the_callers_random_state(rows: TrainingRows) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    objective = new_objective(rows)
    torch.manual_seed(5)
    train(objective, new_batches(rows), LOOP.model_copy(update={"epochs": 1}), seed=0, stage="two_tower")
    assert torch.equal(torch.rand(3), expected)


def test_damaged_checkpoint_is_rejected_with_its_path(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path)
    for number in range(4):
        checkpoints.save({"epoch": number}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000002.pt", "checkpoint-000003.pt"]
    assert checkpoints.load() == {"epoch": 3}
    (tmp_path / "checkpoint-000003.pt").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"checkpoint-000003\.pt: not a readable checkpoint"):
        checkpoints.load()
