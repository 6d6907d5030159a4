"""AUC, log loss and calibration of the ranker's heads on impressions after the cut.

Features are those of the request that led to the impression, as in training. The position is left out, as in serving. A
head whose labels have only one value has no AUC; it is reported as undefined.
"""

# Shapes: N rows, K tasks

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.evaluation.metrics import (
    BootstrapEstimate,
    auc_estimate,
    calibration_error,
    log_loss,
    rows_estimate,
)
from reelway.platform.contracts.feature_names import BINARY_TASKS, RANKER_INPUTS
from reelway.platform.features.scoring import head_predictions

if TYPE_CHECKING:
    from reelway.pipelines.training.artifacts import TrainedModels
    from reelway.pipelines.training.rows import TrainingRows

MAX_ROWS: Final = 50_000


@dataclass(frozen=True)
class HeadQuality:
    """Quality of one binary head after the cut."""

    task: str
    rows: int
    positives: int
    auc: BootstrapEstimate
    log_loss: BootstrapEstimate
    error_before: BootstrapEstimate
    """Expected calibration error before calibration."""
    error_after: BootstrapEstimate
    """Expected calibration error after calibration."""

    @property
    def defined(self) -> bool:
        """Whether both classes occur in the labels."""
        return 0 < self.positives < self.rows

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-compatible values."""
        estimates = ("auc", "log_loss", "error_before", "error_after")
        return {
            "task": self.task,
            "rows": self.rows,
            "positives": self.positives,
            **{name: getattr(self, name).to_dict() for name in estimates},
        }


def evaluate_heads(
    models: TrainedModels, rows: TrainingRows, cut_s: float, *, max_rows: int = MAX_ROWS, seed: int = 0
) -> list[HeadQuality]:
    """Evaluates every binary head on impressions from ``cut_s`` on, or on a seeded sample of ``max_rows`` of them."""
    index = rows.between(cut_s, np.inf)
    if len(index) > max_rows:
        index = np.sort(np.random.default_rng([seed, 5]).choice(index, max_rows, replace=False))
    if not len(index):
        return []
    outputs_NK = _outputs(models, rows, index)
    calibrated_NK = head_predictions(outputs_NK, models.calibration).astype(np.float64)
    viewer_N = rows.viewer_id[index]
    reports = []
    for k, task in enumerate(BINARY_TASKS):
        label_N = rows.labels[index, k].astype(np.float64)
        logit_N = outputs_NK[:, k].astype(np.float64)
        raw_N = 1.0 / (1.0 + np.exp(-logit_N))
        reports.append(
            HeadQuality(
                task=task,
                rows=len(index),
                positives=int(label_N.sum()),
                auc=auc_estimate(logit_N, label_N, viewer_N, seed=seed),
                log_loss=rows_estimate(partial(log_loss, calibrated_NK[:, k], label_N), viewer_N, seed=seed),
                error_before=rows_estimate(partial(calibration_error, raw_N, label_N), viewer_N, seed=seed),
                error_after=rows_estimate(
                    partial(calibration_error, calibrated_NK[:, k], label_N), viewer_N, seed=seed
                ),
            )
        )
    return reports


def _outputs(models: TrainedModels, rows: TrainingRows, index: NDArray[np.int64]) -> NDArray[np.float32]:
    from reelway.pipelines.training.batches import ranking_tensors
    from reelway.pipelines.training.fit import embed_needed_viewers
    from reelway.pipelines.training.inference import embed_videos, score
    from reelway.pipelines.training.negatives import impression_rows

    shown = impression_rows(rows, index)
    viewer_VD = embed_needed_viewers(models.two_tower, rows, shown.viewer_row)
    video_MD = embed_videos(models.two_tower, rows.videos)
    batch = ranking_tensors(rows, shown, viewer_VD, video_MD, np.arange(len(shown)))
    return score(models.ranker, {name: batch[name].numpy() for name in RANKER_INPUTS}, batch["row_viewer"].numpy())
