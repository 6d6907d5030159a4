"""The two-tower: inputs that change an embedding, and inputs that must not."""

from __future__ import annotations

import pytest
import torch
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.model_input_fixtures import video_inputs, viewer_inputs
from torch import Tensor

from reelway.pipelines.models.input_layers import HashedIdEmbedding, Standardiser
from reelway.pipelines.models.two_tower import TwoTower, TwoTowerConfig
from reelway.platform.contracts.feature_names import VIDEO_TOWER_INPUTS, VIEWER_TOWER_INPUTS


@pytest.fixture
def model() -> TwoTower:
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(dim=16, layers=2, heads=2), DIMENSIONS)
    model.ids.mark_known(torch.arange(1, 1 << 15))
    model.video_tower.creators.mark_known(torch.arange(1, 1 << 15))
    return model.eval()


def embed_viewers(model: TwoTower, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.viewer_tower(*(inputs[name] for name in VIEWER_TOWER_INPUTS))


def embed_videos(model: TwoTower, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.video_tower(*(inputs[name] for name in VIDEO_TOWER_INPUTS))


def test_towers_give_unit_vectors_when_numbers_are_missing(model: TwoTower) -> None:
    for embedding in (embed_viewers(model, viewer_inputs(5)), embed_videos(model, video_inputs(7))):
        assert embedding.shape[1] == 16
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))


def test_padding_does_not_change_the_embedding(model: TwoTower) -> None:
    short = viewer_inputs(3, length=7)
    padded = dict(short)
    padded["history_codes"] = torch.nn.functional.pad(short["history_codes"], (0, 0, 43, 0))
    for name in ("history_weights", "history_age_h"):
        padded[name] = torch.nn.functional.pad(short[name], (43, 0))
    torch.testing.assert_close(embed_viewers(model, padded), embed_viewers(model, short))


def test_viewer_without_history_depends_on_context_alone(model: TwoTower) -> None:
    inputs = viewer_inputs(2)
    inputs["history_codes"].zero_()
    first, second = embed_viewers(model, inputs)
    assert torch.isfinite(first).all()
    assert (first - second).abs().max() > 1e-3
    inputs["history_weights"] += 5.0  # values in padded slots
    torch.testing.assert_close(embed_viewers(model, inputs)[0], first)


def test_embedding_depends_on_order_outcomes_ages(model: TwoTower) -> None:
    inputs = viewer_inputs(1, length=6)
    before = embed_viewers(model, inputs)
    for name in ("history_codes", "history_weights", "history_age_h"):
        changed = dict(inputs) | {name: inputs[name].flip(1)}
        assert (embed_viewers(model, changed) - before).abs().max() > 1e-4, name


def test_slot_does_not_depend_on_later_slots(model: TwoTower) -> None:
    layer = model.viewer_tower.history.layers[0]
    x_BSD = torch.randn(1, 6, 16)
    blocked = model.viewer_tower.history._blocked(torch.zeros(1, 5, dtype=torch.bool))
    later = x_BSD.clone()
    later[:, 4] = torch.randn(16)
    with torch.no_grad():
        before, after = (layer(x, blocked, last_only=False) for x in (x_BSD, later))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 5] - after[:, 5]).abs().max() > 1e-4


def test_last_slot_alone_equals_the_full_computation(model: TwoTower) -> None:
    layer = model.viewer_tower.history.layers[0]
    x_BSD = torch.randn(2, 6, 16)
    blocked = model.viewer_tower.history._blocked(torch.tensor([[True, True, False, False, False]] * 2))
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x_BSD, blocked, last_only=True), layer(x_BSD, blocked, last_only=False)[:, -1:]
        )


def test_tower_reads_the_configured_history_length() -> None:
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(dim=16, history_length=5), DIMENSIONS).eval()
    model.ids.mark_known(torch.arange(1, 1 << 15))
    inputs = viewer_inputs(1)
    before = embed_viewers(model, inputs)
    inputs["history_codes"][:, :45] = 7
    torch.testing.assert_close(embed_viewers(model, inputs), before)
    inputs["history_codes"][:, 45] = 7
    assert (embed_viewers(model, inputs) - before).abs().max() > 1e-4


def test_unknown_ids_share_one_vector() -> None:
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(dim=16), DIMENSIONS).eval()
    model.ids.mark_known(torch.tensor([11, 12, 21, 22]))
    videos = {name: values[:1].repeat(4, *[1] * (values.ndim - 1)) for name, values in video_inputs(1).items()}
    videos["video_codes"] = torch.tensor([[11, 12], [21, 22], [900, 901], [11, 902]])
    known, other, cold, half_known = embed_videos(model, videos)
    assert (known - other).abs().max() > 1e-3
    torch.testing.assert_close(cold, half_known)  # one unknown code makes the id unknown
    videos["text"] = torch.randn(4, videos["text"].shape[1])
    assert (embed_videos(model, videos)[2] - cold).abs().max() > 1e-4


def test_missing_modality_uses_the_learned_vector(model: TwoTower) -> None:
    videos = video_inputs(1)
    videos["video_static_dense"][:, 1] = 0.0  # has_visual
    before = embed_videos(model, videos)
    videos["visual"] += 100.0
    torch.testing.assert_close(embed_videos(model, videos), before)
    videos["audio"] += 1.0
    assert (embed_videos(model, videos) - before).abs().max() > 1e-4


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(dim=16, dropout=0.0, id_dropout=0.5, modality_dropout=0.5), DIMENSIONS)
    model.ids.mark_known(torch.arange(1, 1 << 15))
    videos = video_inputs(20)
    assert (embed_videos(model, videos) - embed_videos(model, videos)).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(embed_videos(model, videos), embed_videos(model, videos))


def test_id_dropout_hides_the_configured_share_of_ids() -> None:
    torch.manual_seed(0)
    ids = HashedIdEmbedding(4, DIMENSIONS.id_buckets, dropout=0.3)
    ids.mark_known(torch.arange(1, 100))
    hidden = (ids(torch.full((4000, 2), 7)) == ids.unknown).all(dim=1).float().mean()
    assert 0.26 < hidden < 0.34


def test_standardiser_centres_values_with_missing_indicators() -> None:
    standardiser = Standardiser(3)
    values = torch.tensor([[1.0, 5.0, float("nan")], [3.0, 5.0, float("nan")], [float("nan"), 5.0, float("nan")]])
    standardiser.fit(values)
    out = standardiser(values)
    torch.testing.assert_close(out[:2, 0], torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(out[:, 1], torch.zeros(3))  # constant: no blow-up
    torch.testing.assert_close(out[:, 3:], torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 0, 1]]))
    assert out[2, 0] == 0
    assert torch.isfinite(standardiser(torch.tensor([[1e30, -1e30, float("inf")]]))).all()


@pytest.mark.parametrize(("field", "value"), [("history_length", 0), ("dim", 0), ("heads", 5)])
def test_config_rejects_an_impossible_size(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        TwoTowerConfig(**{"dim": 16, field: value})


def test_id_table_has_rows_for_known_codes_only() -> None:
    torch.manual_seed(0)
    ids, fresh = HashedIdEmbedding(4, DIMENSIONS.id_buckets), HashedIdEmbedding(4, DIMENSIONS.id_buckets)
    ids.mark_known(torch.tensor([[5, 0], [9, 5]]))
    assert ids.table.num_embeddings == 3  # unknown, 5, 9
    fresh.load_state_dict(ids.state_dict())
    codes = torch.tensor([[5, 9], [9, 9], [5, 6], [0, 0]])
    torch.testing.assert_close(fresh(codes), ids(codes))
    assert (ids(codes)[2:] == ids.unknown).all()
    assert (ids(codes)[:2] != ids.unknown).any(dim=1).all()
