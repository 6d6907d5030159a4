"""Batches: every row once per epoch over all workers, reproducible steps, correct pools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.training_row_fixtures import made_table, write_rows

from reelway.pipelines.models.losses import log_inclusion
from reelway.pipelines.training.batches import GroupedBatchOrder, RankingBatches, RetrievalBatches, Worker
from reelway.pipelines.training.config import LoopConfig, RetrievalDataConfig
from reelway.pipelines.training.negatives import impression_rows
from reelway.pipelines.training.rows import TrainingRows, load_rows
from reelway.platform.errors import TrainingError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TrainingRows:
    return load_rows(write_rows(tmp_path_factory.mktemp("rows") / "r.parquet", made_table(requests=100)), DIMENSIONS)


def everything(rows: TrainingRows) -> np.ndarray:
    return np.arange(len(rows))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_epoch_covers_every_row_once_over_all_workers(rows: TrainingRows, world: int) -> None:
    orders = [GroupedBatchOrder(rows.viewer_row, LoopConfig(batch_size=64), 5, Worker(r, world)) for r in range(world)]
    assert len({order.steps for order in orders}) == 1
    for epoch in (0, 1):
        covered = np.concatenate([order.rows(epoch, s) for order in orders for s in range(order.steps)])
        np.testing.assert_array_equal(np.sort(covered), np.arange(len(rows)))
    first, second = (np.concatenate([orders[0].rows(epoch, s) for s in range(3)]) for epoch in (0, 1))
    assert not np.array_equal(first[:20], second[:20])


def test_rows_with_one_viewer_row_are_in_one_batch(rows: TrainingRows) -> None:
    order = GroupedBatchOrder(rows.viewer_row, LoopConfig(batch_size=64), 5, Worker())
    home = np.empty(len(rows), dtype=int)
    for step in range(order.steps):
        home[order.rows(0, step)] = step
    for viewer_row in np.unique(rows.viewer_row):
        assert len(np.unique(home[rows.viewer_row == viewer_row])) == 1


def test_step_is_reproducible_without_earlier_steps(rows: TrainingRows) -> None:
    def new_batches() -> RetrievalBatches:
        return RetrievalBatches(
            rows, everything(rows), RetrievalDataConfig(uniform_negatives=8), LoopConfig(batch_size=64), seed=3
        )

    walked, jumped = new_batches(), new_batches()
    for step in range(walked.steps):
        walked.batch(0, step)
    for name, values in walked.batch(1, 1).items():
        assert torch.equal(values.nan_to_num(), jumped.batch(1, 1)[name].nan_to_num()), name


def test_targets_index_the_rows_videos_in_the_pool(rows: TrainingRows) -> None:
    data = RetrievalDataConfig(uniform_negatives=8)
    batches = RetrievalBatches(rows, everything(rows), data, LoopConfig(batch_size=64), seed=3)
    chosen = batches.index[batches.order.rows(0, 0)]
    batch = batches.batch(0, 0)
    np.testing.assert_array_equal(
        batch["video_codes"][batch["target"]].numpy(), rows.videos.video_codes[rows.video_row[chosen]]
    )
    np.testing.assert_array_equal(
        batch["history_codes"][batch["row_viewer"]].numpy(), rows.viewers.history_codes[rows.viewer_row[chosen]]
    )
    assert len(torch.unique(batch["video_codes"], dim=0)) == len(batch["video_codes"])
    assert (rows.weight[chosen] > 0).all()


def test_log_q_follows_the_share_of_positives(rows: TrainingRows) -> None:
    data = RetrievalDataConfig(uniform_negatives=8, log_q_power=0.5)
    batches = RetrievalBatches(rows, everything(rows), data, LoopConfig(batch_size=64), seed=3)
    batch = batches.batch(0, 0)
    positives = rows.video_row[rows.weight > 0]
    target_video = rows.video_row[batches.index[batches.order.rows(0, 0)][0]]
    share = torch.tensor([(positives == target_video).mean()])
    expected = 0.5 * log_inclusion(share, len(batch["target"]), 1 / len(rows.video_ids), 8)
    torch.testing.assert_close(batch["log_q"][batch["target"][0]], expected[0])


def test_small_catalogue_is_the_pool_without_correction(rows: TrainingRows) -> None:
    data = RetrievalDataConfig(uniform_negatives=1000)
    batch = RetrievalBatches(rows, everything(rows), data, LoopConfig(batch_size=64), seed=3).batch(0, 0)
    assert len(batch["video_codes"]) == len(rows.video_ids)
    assert (batch["log_q"] == 0).all()


def test_pool_excludes_videos_from_after_the_window(rows: TrainingRows) -> None:
    window = everything(rows)[:40]
    batches = RetrievalBatches(rows, window, RetrievalDataConfig(uniform_negatives=1000), LoopConfig(), seed=3)
    assert set(batches.catalogue) == set(rows.video_row[window])
    assert len(batches.catalogue) < len(rows.video_ids)


def test_older_positives_weigh_less_by_their_half_life(rows: TrainingRows) -> None:
    data = RetrievalDataConfig(recency_half_life_d=5.0)
    batches = RetrievalBatches(rows, everything(rows), data, LoopConfig(), seed=3)
    plain = np.minimum(rows.weight[batches.index], 3.0)
    age_d = (rows.event_time_s[batches.index].max() - rows.event_time_s[batches.index]) / 86_400
    np.testing.assert_allclose(batches.weight, plain * 0.5 ** (age_d / 5.0), rtol=1e-5)


def test_ranking_batch_carries_the_values_of_its_rows(rows: TrainingRows) -> None:
    viewer_VD = np.random.default_rng(0).random((len(rows.viewers.viewer_dense), 4), dtype=np.float32)
    video_MD = np.random.default_rng(1).random((len(rows.video_ids), 4), dtype=np.float32)
    batches = RankingBatches(
        rows, impression_rows(rows, everything(rows)), viewer_VD, video_MD, LoopConfig(batch_size=50), seed=1
    )
    chosen, batch = batches.order.rows(0, 1), batches.batch(0, 1)
    np.testing.assert_array_equal(batch["labels"].numpy(), rows.labels[chosen])
    np.testing.assert_array_equal(batch["video_dense"].numpy(), rows.video_dense[chosen])
    np.testing.assert_array_equal(
        batch["viewer_embedding"][batch["row_viewer"]].numpy(), viewer_VD[rows.viewer_row[chosen]]
    )
    np.testing.assert_array_equal(batch["video_embedding"].numpy(), video_MD[rows.video_row[chosen]])
    np.testing.assert_array_equal(batch["position"].numpy(), rows.position[chosen])


def test_retrieval_batches_reject_rows_without_positives(rows: TrainingRows) -> None:
    unloved = np.flatnonzero(rows.weight <= 0)
    with pytest.raises(TrainingError, match="positive outcome weight"):
        RetrievalBatches(rows, unloved, RetrievalDataConfig(), LoopConfig(), seed=0)


def test_batches_reject_more_workers_than_requests() -> None:
    with pytest.raises(TrainingError, match="1 distinct viewer rows for 2 workers"):
        GroupedBatchOrder(np.zeros(9, dtype=np.int32), LoopConfig(), 0, Worker(0, 2))
