"""Training objectives of the two models: a batch's tensors in, one scalar loss and its parts out.

An objective contains its model, so that data-parallel training wraps one module with all parameters.
"""

# Shapes: V distinct viewers, R rows (positives), P pool of videos, D embedding, K tasks

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelway.pipelines.models.ranker import Ranker
from reelway.pipelines.models.two_tower import TwoTower
from reelway.platform.contracts.feature_names import (
    BINARY_TASKS,
    RANKER_INPUTS,
    RANKER_TASKS,
    VIDEO_TOWER_INPUTS,
    VIEWER_TOWER_INPUTS,
)

Batch = Mapping[str, Tensor]
_BLOCKED = -1e9


def log_inclusion(share: Tensor, draws: int, uniform_share: float, uniform_draws: int) -> Tensor:
    """Returns the log probability that a video is in a pool of ``draws`` positives and ``uniform_draws`` uniform ones.

    Subtracted from the logits, it makes the pool's sum of exponentials an unbiased estimate of the sum over all videos
    (Horvitz and Thompson 1952). This is the log-Q correction of Yi et al. 2019, for a pool without duplicates.

    Args:
        share: each video's share of the positives, ``[P]``.
    """
    left_out = draws * torch.log1p(-share.double().clamp(max=1 - 1e-9))
    if uniform_draws:
        left_out = left_out + uniform_draws * torch.log1p(-torch.tensor(min(uniform_share, 1 - 1e-9)).double())
    return torch.log(-torch.expm1(left_out).clamp(max=-1e-12)).float()


def blocked_pairs(viewer_R: Tensor, target_R: Tensor, pool: int) -> Tensor:
    """Returns ``[R, P]``: true where a pool video is another positive of the row's viewer, so not a negative."""
    _, person_R = torch.unique(viewer_R, return_inverse=True)
    liked = torch.zeros(int(person_R.max()) + 1, pool, dtype=torch.bool, device=target_R.device)
    liked[person_R, target_R] = True
    blocked = liked[person_R]
    blocked[torch.arange(len(target_R), device=target_R.device), target_R] = False
    return blocked


def sampled_softmax(
    scores_RP: Tensor,
    target_R: Tensor,
    weight_R: Tensor,
    log_q_P: Tensor,
    blocked_RP: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the weighted cross-entropy of each row's video against the pool, with the log-Q correction.

    The sum leaves out blocked pairs. A row of weight 0 has no effect. Label smoothing spreads its mass over the pairs
    that are not blocked.
    """
    logits_RP = (scores_RP.float() - log_q_P).masked_fill(blocked_RP, _BLOCKED)
    log_p_RP = F.log_softmax(logits_RP, dim=-1)
    loss_R = -log_p_RP.gather(1, target_R.unsqueeze(1)).squeeze(1)
    if label_smoothing:
        allowed_RP = ~blocked_RP
        spread_R = -(log_p_RP * allowed_RP).sum(dim=-1) / allowed_RP.sum(dim=-1)
        loss_R = (1 - label_smoothing) * loss_R + label_smoothing * spread_R
    return (loss_R * weight_R).sum() / weight_R.sum().clamp(min=1e-6)


class RetrievalObjective(nn.Module):
    """Sampled softmax over the pool; ``forward(batch)`` is what DistributedDataParallel wraps."""

    def __init__(self, model: TwoTower, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns ``loss``, and ``top1``: the share of rows whose video scores highest in the pool."""
        viewer_VD = self.model.viewer_tower(*(batch[name] for name in VIEWER_TOWER_INPUTS))
        video_PD = self.model.video_tower(*(batch[name] for name in VIDEO_TOWER_INPUTS))
        scores_RP = (viewer_VD @ video_PD.T).index_select(0, batch["row_viewer"]) / self.model.temperature()
        target_R = batch["target"]
        blocked_RP = blocked_pairs(batch["viewer_id"], target_R, len(video_PD))
        loss = sampled_softmax(
            scores_RP, target_R, batch["weight"], batch["log_q"], blocked_RP, label_smoothing=self.label_smoothing
        )
        with torch.no_grad():
            best_R = scores_RP.float().masked_fill(blocked_RP, _BLOCKED).argmax(dim=-1)
            top1 = (best_R == target_R).float().mean()
        return {"loss": loss, "top1": top1}


class RankingObjective(nn.Module):
    """Binary cross-entropy for each probability head; Huber loss on log1p(seconds) for ``watch_s``."""

    def __init__(self, model: Ranker) -> None:
        super().__init__()
        self.model = model
        weights = [model.config.task_weights.get(task, 1.0) for task in RANKER_TASKS]
        self.register_buffer("task_weight", torch.tensor(weights), persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(len(RANKER_TASKS)), requires_grad=model.config.uncertainty)

    task_weight: Tensor

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns ``loss`` and one unweighted entry per head. Labels are ``[R, K]`` with ``watch_s`` in seconds."""
        outputs_RK = self.model(*(batch[name] for name in RANKER_INPUTS), viewer_index=batch["row_viewer"]).float()
        learning_K = ~self.model.fixed
        outputs_RK = outputs_RK + self.model.position_bias(batch["position"]) * learning_K
        losses_K = head_losses(outputs_RK, batch["labels"])
        weighted_K = losses_K * self.task_weight
        if self.model.config.uncertainty:
            # Kendall et al. 2018: exp(-s) L + s / 2 per task, s = log variance
            weighted_K = torch.exp(-self.log_variance) * weighted_K + 0.5 * self.log_variance
        loss = torch.where(learning_K, weighted_K, torch.zeros_like(weighted_K)).sum()
        return {"loss": loss, **named_losses(losses_K.detach(), RANKER_TASKS)}


def head_losses(outputs_RK: Tensor, labels_RK: Tensor) -> Tensor:
    """Returns the mean loss per head, ``[K]``; the last head is watch time."""
    binary = len(BINARY_TASKS)
    binary_RK = F.binary_cross_entropy_with_logits(outputs_RK[:, :binary], labels_RK[:, :binary], reduction="none")
    watch_R = F.huber_loss(outputs_RK[:, binary], torch.log1p(labels_RK[:, binary]), reduction="none")
    return torch.cat([binary_RK.mean(dim=0), watch_R.mean().unsqueeze(0)])


def named_losses(losses_K: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    return {task: losses_K[k] for k, task in enumerate(tasks)}
