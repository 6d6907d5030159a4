"""The ranker: batched viewers, cross features, constant heads, position bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.model_input_fixtures import video_inputs, viewer_inputs
from torch import Tensor

from reelway.pipelines.models.ranker import GroupedLinear, PositionBias, Ranker, RankerConfig
from reelway.platform.contracts.feature_names import RANKER_INPUTS, RANKER_TASKS

D = 8


def ranker_inputs(viewers: int, candidates: int) -> dict[str, Tensor]:
    inputs = viewer_inputs(viewers) | video_inputs(candidates)
    inputs["viewer_embedding"] = F.normalize(torch.randn(viewers, D), dim=1)
    inputs["video_embedding"] = F.normalize(torch.randn(candidates, D), dim=1)
    return inputs


def make_ranker(**config: Any) -> Ranker:
    torch.manual_seed(0)
    ranker = Ranker(RankerConfig(**config), D, DIMENSIONS)
    ranker.creators.mark_known(torch.arange(1, 1 << 15))
    return ranker.eval()


def outputs(ranker: Ranker, inputs: dict[str, Tensor], viewer_index: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return ranker(*(inputs[name] for name in RANKER_INPUTS), viewer_index=viewer_index)


@pytest.mark.parametrize("kind", ["mmoe", "shared_bottom"])
def test_batched_viewers_score_like_single_viewers(kind: str) -> None:
    ranker = make_ranker(kind=kind)
    inputs = ranker_inputs(3, 12)
    index = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2])
    together = outputs(ranker, inputs, index)
    assert together.shape == (12, len(RANKER_TASKS))
    for viewer in range(3):
        alone = {
            name: inputs[name][viewer : viewer + 1] if name in RANKER_INPUTS[:3] else inputs[name][index == viewer]
            for name in RANKER_INPUTS
        }
        torch.testing.assert_close(outputs(ranker, alone), together[index == viewer])


def test_scores_are_finite_when_all_numbers_are_missing() -> None:
    inputs = ranker_inputs(1, 2)
    inputs["viewer_dense"].fill_(float("nan"))
    inputs["video_dense"].fill_(float("nan"))
    inputs["viewer_categories"].zero_()
    inputs["video_categories"].zero_()
    assert torch.isfinite(outputs(make_ranker(), inputs)).all()


def test_cross_features_hold_affinity_language_similarity() -> None:
    inputs = ranker_inputs(1, 3)
    inputs["viewer_dense"][0] = float("nan")
    inputs["viewer_dense"][0, DIMENSIONS.viewer_dense.index("topic_affinity_4")] = 0.25
    inputs["viewer_categories"][0, 1] = 9
    inputs["video_categories"] = torch.tensor([[5, 9], [0, 8], [7, 0]])  # topic 4; unknown; topic 6 (affinity missing)
    crosses, products = make_ranker()._cross_features(
        *(inputs[n] for n in ("viewer_dense", "viewer_categories", "viewer_embedding")),
        *(inputs[n] for n in ("video_categories", "video_embedding")),
        None,
    )
    torch.testing.assert_close(crosses[:, 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(crosses[:, 2], torch.tensor([1.0, 0.0, 0.0]))  # same language
    torch.testing.assert_close(crosses[:, 3], torch.tensor([0.0, 1.0, 0.0]))  # another language; unknown is neither
    similarity = (inputs["video_embedding"] @ inputs["viewer_embedding"][0]) * 4
    torch.testing.assert_close(crosses[:, 4], similarity)
    torch.testing.assert_close(products.sum(dim=1) * 4 / D**0.5, similarity)


@pytest.mark.parametrize("similarity_only", [True, False])
def test_similarity_only_ranker_is_invariant_to_rotation(similarity_only: bool) -> None:
    ranker, inputs = make_ranker(similarity_only=similarity_only), ranker_inputs(2, 6)
    turn, _ = torch.linalg.qr(torch.randn(D, D))
    turned = inputs | {name: inputs[name] @ turn for name in ("viewer_embedding", "video_embedding")}
    index = torch.tensor([0, 1, 0, 1, 0, 1])
    before, after = outputs(ranker, inputs, index), outputs(ranker, turned, index)
    assert torch.allclose(before, after, atol=1e-5) == similarity_only
    assert not torch.allclose(before, outputs(ranker, inputs | {"video_embedding": -inputs["video_embedding"]}, index))


def test_constant_head_outputs_its_logit() -> None:
    ranker, inputs = make_ranker(), ranker_inputs(1, 4)
    before = outputs(ranker, inputs)
    ranker.set_constant_head("share", -3.5)
    after = outputs(ranker, inputs)
    share = RANKER_TASKS.index("share")
    assert (after[:, share] == -3.5).all()
    others = [k for k in range(len(RANKER_TASKS)) if k != share]
    torch.testing.assert_close(after[:, others], before[:, others])


def test_grouped_linear_equals_separate_layers() -> None:
    grouped = GroupedLinear(3, 5, 2)
    torch.nn.init.normal_(grouped.bias)
    x = torch.randn(7, 3, 5)
    expected = torch.stack([x[:, g] @ grouped.weight[g] + grouped.bias[g] for g in range(3)], dim=1)
    torch.testing.assert_close(grouped(x), expected)


def test_position_bias_is_zero_for_videos_not_shown() -> None:
    bias = PositionBias(dropout=0.0)
    torch.nn.init.normal_(bias.bias.weight)
    out = bias(torch.tensor([-1, 0, 1, 63, 5000]))
    assert (out[0] == 0).all()
    assert (out[1] != out[2]).any()
    torch.testing.assert_close(out[3], out[4])


def test_every_expert_gets_a_gradient() -> None:
    ranker, inputs = make_ranker(experts=3), ranker_inputs(1, 5)
    ranker(*(inputs[name] for name in RANKER_INPUTS)).sum().backward()
    assert (ranker.trunk.second.weight.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_config_rejects_an_unknown_kind_or_task() -> None:
    with pytest.raises(ValueError, match=r"kind\n.*'shared_bottom' or 'mmoe'"):
        RankerConfig(kind="ple")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="watch_ms"):
        RankerConfig(task_weights={"watch_ms": 1.0})
