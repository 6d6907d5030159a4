"""The losses, compared with enumeration, torch and a simulation of the sampling."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.model_input_fixtures import video_inputs, viewer_inputs
from torch import Tensor

from reelway.pipelines.models.losses import (
    RankingObjective,
    blocked_pairs,
    head_losses,
    log_inclusion,
    sampled_softmax,
)
from reelway.pipelines.models.ranker import Ranker, RankerConfig
from reelway.platform.contracts.feature_names import RANKER_INPUTS, RANKER_TASKS


def no_pairs(scores: Tensor) -> Tensor:
    return torch.zeros(scores.shape, dtype=torch.bool)


def test_pool_probability_equals_the_enumerated_probability() -> None:
    share = torch.tensor([0.5, 0.3, 0.2])
    expected = torch.zeros(3, dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=2):  # two positives
        for uniform in range(3):  # one uniform draw
            chance = share[draws[0]].item() * share[draws[1]].item() / 3
            for video in {*draws, uniform}:
                expected[video] += chance
    torch.testing.assert_close(log_inclusion(share, 2, 1 / 3, 1).exp().double(), expected, rtol=1e-5, atol=1e-6)


def test_rare_video_has_a_finite_log_probability() -> None:
    log_q = log_inclusion(torch.tensor([0.0, 1e-12, 1.0]), 1000, 0.0, 0)
    assert torch.isfinite(log_q).all()
    assert log_q[0] <= log_q[1] < -10
    assert log_q[2] == pytest.approx(0.0, abs=1e-6)


def test_log_q_makes_the_pool_sum_unbiased() -> None:
    torch.manual_seed(0)
    share = F.softmax(torch.randn(40) * 1.5, dim=0)
    scores = torch.randn(40)
    exact = scores.exp().sum().item()
    corrected, plain, runs = 0.0, 0.0, 3000
    log_q = log_inclusion(share, 8, 1 / 40, 4)
    for _ in range(runs):
        pool = torch.unique(torch.cat([torch.multinomial(share, 8, True), torch.randint(0, 40, (4,))]))
        corrected += (scores[pool] - log_q[pool]).exp().sum().item() / runs
        plain += scores[pool].exp().sum().item() / runs
    assert corrected == pytest.approx(exact, rel=0.05)
    assert plain < 0.5 * exact


def test_softmax_over_all_videos_is_cross_entropy() -> None:
    scores, target = torch.randn(6, 9), torch.randint(0, 9, (6,))
    for smoothing in (0.0, 0.2):
        actual = sampled_softmax(
            scores, target, torch.ones(6), torch.zeros(9), no_pairs(scores), label_smoothing=smoothing
        )
        torch.testing.assert_close(actual, F.cross_entropy(scores, target, label_smoothing=smoothing))


def test_rows_count_by_their_weight() -> None:
    scores, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    actual = sampled_softmax(scores, target, torch.tensor([2.0, 0.0, 1.0]), torch.zeros(5), no_pairs(scores))
    each = F.cross_entropy(scores, target, reduction="none")
    torch.testing.assert_close(actual, (2 * each[0] + each[2]) / 3)


def test_other_positive_of_the_viewer_is_no_negative() -> None:
    viewer, target = torch.tensor([7, 7, 8]), torch.tensor([0, 2, 2])
    blocked = blocked_pairs(viewer, target, 4)
    expected = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(blocked, expected)
    scores = torch.zeros(3, 4)
    scores[0, 2] = 50.0  # would dominate row 0 if it counted
    losses = [
        sampled_softmax(scores, target, weight, torch.zeros(4), blocked).item()
        for weight in (torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1]))
    ]
    assert losses == pytest.approx([torch.tensor(3.0).log().item(), torch.tensor(4.0).log().item()])


def test_head_losses_are_cross_entropy_or_huber() -> None:
    outputs, labels = torch.randn(10, 8), torch.randint(0, 2, (10, 8)).float()
    labels[:, 7] = torch.rand(10) * 300
    losses = head_losses(outputs, labels)
    torch.testing.assert_close(losses[2], F.binary_cross_entropy_with_logits(outputs[:, 2], labels[:, 2]))
    torch.testing.assert_close(losses[7], F.huber_loss(outputs[:, 7], labels[:, 7].log1p()))


def ranking_batch(rows: int = 8) -> dict[str, Tensor]:
    inputs = viewer_inputs(2) | video_inputs(rows)
    inputs["viewer_embedding"], inputs["video_embedding"] = torch.randn(2, 4), torch.randn(rows, 4)
    batch = {name: inputs[name] for name in RANKER_INPUTS}
    labels = torch.randint(0, 2, (rows, len(RANKER_TASKS))).float()
    return batch | {"row_viewer": torch.arange(rows) % 2, "position": torch.arange(rows), "labels": labels}


def test_constant_head_gets_no_gradient() -> None:
    torch.manual_seed(0)
    ranker = Ranker(RankerConfig(position_dropout=0.0), 4, DIMENSIONS)
    batch = ranking_batch()
    objective = RankingObjective(ranker)
    before = objective(batch)
    ranker.set_constant_head("like", -40.0)
    after = objective(batch)
    torch.testing.assert_close(after["loss"], before["loss"] - before["like"])
    after["loss"].backward()
    assert ranker.position_bias.bias.weight.grad[:, RANKER_TASKS.index("like")].abs().max() == 0
    assert ranker.position_bias.bias.weight.grad[:, RANKER_TASKS.index("save")].abs().max() > 0


def test_learned_uncertainty_follows_kendalls_formula() -> None:
    torch.manual_seed(0)
    weights = dict.fromkeys(RANKER_TASKS, 1.0)
    objective = RankingObjective(
        Ranker(RankerConfig(uncertainty=True, task_weights=weights, position_dropout=0.0), 4, DIMENSIONS)
    )
    with torch.no_grad():
        objective.log_variance.copy_(torch.linspace(-1, 1, len(RANKER_TASKS)))
    result = objective(ranking_batch())
    parts = torch.stack([result[task] for task in RANKER_TASKS])
    s = objective.log_variance
    torch.testing.assert_close(result["loss"], (torch.exp(-s) * parts + s / 2).sum())
    result["loss"].backward()
    assert objective.log_variance.grad is not None


def test_position_bias_is_not_part_of_the_scores() -> None:
    torch.manual_seed(0)
    ranker = Ranker(RankerConfig(position_dropout=0.0), 4, DIMENSIONS)
    batch = ranking_batch()
    objective = RankingObjective(ranker)
    moved = batch | {"position": batch["position"] + 3}
    with torch.no_grad():
        ranker.position_bias.bias.weight.normal_()
        assert objective(batch)["loss"] != objective(moved)["loss"]
    assert "position" not in RANKER_INPUTS
