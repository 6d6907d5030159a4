"""The inference form of the ranker gives the ranker's outputs for every configuration."""

from __future__ import annotations

import pytest
import torch
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.models.inference_ranker import InferenceRanker
from reelway.pipelines.models.ranker import Ranker, RankerConfig
from reelway.platform.contracts import feature_names as names

WIDTH = 12


def a_request(candidates: int) -> list[torch.Tensor]:
    """One viewer with missing features, and candidates of which some have no known feature."""
    chance = torch.Generator().manual_seed(candidates)
    viewer_dense = torch.rand(1, len(DIMENSIONS.viewer_dense), generator=chance) - 0.3
    viewer_dense[0, ::7] = float("nan")
    video_dense = 100 * torch.rand(candidates, len(names.VIDEO_DENSE), generator=chance) - 40
    video_dense[::3, ::4] = float("nan")
    video_dense[::2, 1] = 0.0
    video_dense[1::2, 2] = -1e9
    categories = torch.stack(
        [torch.randint(0, DIMENSIONS.topics + 1, (candidates,), generator=chance), torch.randint(0, 3, (candidates,))],
        dim=-1,
    )
    return [
        viewer_dense,
        torch.tensor([[3, 2, 0, 5]]),
        torch.randn(1, WIDTH, generator=chance) / WIDTH**0.5,
        video_dense,
        categories,
        torch.randint(0, 50, (candidates, names.ID_HASHES), generator=chance),
        torch.randn(candidates, WIDTH, generator=chance) / WIDTH**0.5,
    ]


def a_ranker(config: RankerConfig) -> Ranker:
    """Returns a ranker whose parameters all differ from their initial values."""
    torch.manual_seed(1)
    ranker = Ranker(config, WIDTH, DIMENSIONS)
    ranker.creators.mark_known(torch.arange(1, 40))
    ranker.video_dense.fit(50 * torch.rand(100, len(names.VIDEO_DENSE)))
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ranker.set_constant_head("share", -4.0)
    return ranker.eval()


@pytest.mark.parametrize("candidates", [1, 2, 300])
@pytest.mark.parametrize(
    "config",
    [
        RankerConfig(),
        RankerConfig(kind="mmoe", experts=3, expert_hidden=16, expert_out=8, head_hidden=4),
        RankerConfig(kind="shared_bottom"),
        RankerConfig(similarity_only=True),
    ],
    ids=["default", "mmoe", "shared_bottom", "similarity_only"],
)
def test_inference_ranker_equals_the_ranker(config: RankerConfig, candidates: int) -> None:
    ranker = a_ranker(config)
    inputs = a_request(candidates)
    with torch.inference_mode():
        expected, actual = ranker(*inputs), InferenceRanker(ranker).eval()(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if candidates > 2:  # all heads but the constant one distinguish candidates
        assert expected.std(dim=0).gt(1e-3).sum() == len(names.RANKER_TASKS) - 1


@pytest.mark.parametrize("language", [0, 1, 2, 63])
def test_language_match_depends_on_the_viewers_language(language: int) -> None:
    ranker, inputs = a_ranker(RankerConfig()), a_request(300)
    inputs[1][0, names.VIEWER_CATEGORIES.index("language")] = language
    with torch.inference_mode():
        expected, actual = ranker(*inputs), InferenceRanker(ranker).eval()(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_extreme_gate_stays_finite() -> None:
    ranker = a_ranker(RankerConfig())
    with torch.no_grad():
        ranker.trunk.from_viewer.bias += 500 * torch.randn_like(ranker.trunk.from_viewer.bias)
    inputs = a_request(5)
    with torch.inference_mode():
        expected, actual = ranker(*inputs), InferenceRanker(ranker).eval()(*inputs)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
