"""Release gates: bounds on evaluation metrics that a model must meet to become a release. Pure functions.

A gate fails on evidence of harm, not on a lack of evidence. A comparison is judged by the favourable end of its 95 %
interval over viewers: noise does not fail a demo with few viewers, and the same gate is strict with many viewers. A
required metric that could not be computed fails its gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reelway.pipelines.evaluation.harness import NDCG_K, RECALL_K, RankingResult
from reelway.pipelines.evaluation.heads import HeadQuality
from reelway.pipelines.evaluation.metrics import BootstrapEstimate, paired_difference
from reelway.platform.contracts.manifest import GateResult

_UNDEFINED = -1.0
"""Value of a metric that could not be computed. It is outside the range of every gated metric except differences."""


@dataclass(frozen=True)
class GateSettings:
    """Bounds of the gates. ``None`` disables a gate."""

    against_popularity: float | None = 0.0
    """Minimum mean difference of recall and NDCG to all-time popularity."""
    calibration_error: float | None = 0.1
    """Maximum calibration error of a head, after calibration."""
    auc: float | None = 0.5
    """Minimum AUC of a head."""
    coverage: float | None = 0.01
    """Minimum ratio of the achieved to the largest possible catalogue coverage."""
    min_positives: int = 200
    """Heads with fewer positives or negatives after the cut are not gated, because their metrics are too noisy."""


def evaluate_gates(
    result: RankingResult,
    popularity: RankingResult,
    heads: Sequence[HeadQuality],
    *,
    max_coverage: float,
    settings: GateSettings | None = None,
    seed: int = 0,
) -> list[GateResult]:
    """Returns the results of all enabled gates.

    Args:
        max_coverage: largest catalogue coverage that the slates of this number of viewers can have.
    """
    settings = settings or GateSettings()
    gates: list[GateResult] = []
    if settings.against_popularity is not None:
        for name, own_metric, baseline_metric in (
            (f"recall_at_{RECALL_K}", result.recall, popularity.recall),
            (f"ndcg_at_{NDCG_K}", result.ndcg, popularity.ndcg),
        ):
            difference = paired_difference(own_metric, baseline_metric, seed=seed)
            gates.append(_not_below(f"{name}_against_popularity", difference, settings.against_popularity))
    gates += _head_gates(heads, settings)
    if settings.coverage is not None:
        share = result.coverage / max_coverage if max_coverage > 0 else _UNDEFINED
        detail = f"{result.coverage:.2%} of the catalogue is in a slate; at most {max_coverage:.2%} is possible"
        gates.append(_at_least("coverage", share, settings.coverage, detail))
    return gates


def _head_gates(heads: Sequence[HeadQuality], settings: GateSettings) -> list[GateResult]:
    gates = []
    for head in heads:
        if min(head.positives, head.rows - head.positives) < settings.min_positives:
            continue
        counts = f"{head.positives:,} positives of {head.rows:,} impressions"
        if settings.calibration_error is not None:
            error = _finite_or(head.error_after.low, fallback=1.0)
            gates.append(
                GateResult(
                    name=f"{head.task}_calibration_error",
                    value=error,
                    bound=settings.calibration_error,
                    comparison="<=",
                    passed=error <= settings.calibration_error,
                    detail=f"{_interval(head.error_after)}; {counts}",
                )
            )
        if settings.auc is not None:
            auc = _finite_or(head.auc.high)
            gates.append(_at_least(f"{head.task}_auc", auc, settings.auc, f"{_interval(head.auc)}; {counts}"))
    return gates


def _not_below(name: str, difference: BootstrapEstimate, margin: float) -> GateResult:
    detail = f"mean difference {_interval(difference)} over {difference.viewers:,} viewers; the upper end is compared"
    return _at_least(name, _finite_or(difference.high), margin, detail)


def _at_least(name: str, value: float, bound: float, detail: str) -> GateResult:
    return GateResult(name=name, value=value, bound=bound, comparison=">=", passed=value >= bound, detail=detail)


def _finite_or(value: float, *, fallback: float = _UNDEFINED) -> float:
    return float(value) if np.isfinite(value) else fallback


def _interval(estimate: BootstrapEstimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
