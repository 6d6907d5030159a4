"""Evaluates the models of a run and writes ``evaluation.json``, which the release builder reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from reelway.pipelines.evaluation.baselines import RECENT_SHARE, PopularityRecommender, tune_als
from reelway.pipelines.evaluation.gates import GateSettings, evaluate_gates
from reelway.pipelines.evaluation.harness import (
    MAX_VIEWERS,
    MIN_EVENTS,
    RANKING_DEPTH,
    RankingResult,
    Recommender,
    TemporalSplit,
    evaluate_ranking,
    make_temporal_split,
)
from reelway.pipelines.evaluation.heads import HeadQuality, evaluate_heads
from reelway.pipelines.evaluation.recommender import recommenders_at_cut
from reelway.pipelines.features.training_rows import LABELS_FILE, TRAINING_ROWS_FILE
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.blend import Blend
from reelway.platform.contracts.manifest import GateResult
from reelway.platform.errors import EmptyDatasetError
from reelway.platform.eventlog.erasures import of_known_viewers
from reelway.platform.run_directory import RunDirectory

EVALUATION_FILE: Final = "evaluation.json"
TWO_STAGE: Final = "retrieval + ranking"
RETRIEVAL_ONLY: Final = "retrieval alone"
ALL_TIME_POPULARITY: Final = "popularity, all time"
RECENT_POPULARITY: Final = f"popularity, last {RECENT_SHARE:.0%} of training"
ALS: Final = "ALS, tuned"

Report = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation."""

    min_events: int = MIN_EVENTS
    max_viewers: int = MAX_VIEWERS
    seed: int = 0
    gates: GateSettings = field(default_factory=GateSettings)


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics, baselines and gate results of an evaluation."""

    split: TemporalSplit
    ranking: dict[str, RankingResult]  # keyed by the names above; the release candidate comes first
    heads: list[HeadQuality]
    gates: list[GateResult]
    als: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


def _silent(_: str) -> None:
    return None


def evaluate_run(
    run: RunDirectory,
    settings: EvaluationSettings | None = None,
    *,
    blend: Blend | None = None,
    report: Report = _silent,
) -> EvaluationResult:
    """Evaluates ``run.models`` on the events after their training window and writes ``evaluation.json``.

    Raises:
        EmptyDatasetError: if there are no events after the training window or no viewer can be evaluated.
        TrainingError: if the run has no trained models.
    """
    from reelway.pipelines.training.artifacts import load_models
    from reelway.pipelines.training.rows import load_rows

    settings = settings or EvaluationSettings()
    models = load_models(run.models)
    cut_s = models.info.window_end_s
    if not np.isfinite(cut_s):
        raise EmptyDatasetError(
            "models: they were trained on all events (train_fraction 1), so none are left for evaluation; "
            "train again with `--set train_fraction=0.8`"
        )
    labels = of_known_viewers(pq.read_table(run.features / LABELS_FILE))
    split = make_temporal_split(
        labels, cut_s, min_events=settings.min_events, max_viewers=settings.max_viewers, seed=settings.seed
    )
    report(f"{len(split.viewer_ids):,} viewers, {len(split.videos):,} videos; reading features at the cut")
    two_stage, retrieval, catalogue = recommenders_at_cut(models, run.features, split, blend)
    report("tuning ALS")
    als = tune_als(split, seed=settings.seed)
    recommenders: dict[str, Recommender] = {
        TWO_STAGE: two_stage,
        RETRIEVAL_ONLY: retrieval,
        ALL_TIME_POPULARITY: PopularityRecommender(split),
        RECENT_POPULARITY: PopularityRecommender(split, RECENT_SHARE),
        ALS: als,
    }
    content_MD = np.zeros((len(split.videos), catalogue.content.shape[1]), dtype=np.float32)
    content_MD[np.searchsorted(split.videos, catalogue.video_ids)] = catalogue.content
    ranking = {}
    for name, recommender in recommenders.items():
        report(name)
        ranking[name] = evaluate_ranking(recommender, split, content_MD=content_MD, seed=settings.seed)
    report("heads")
    heads = evaluate_heads(
        models, load_rows(run.features / TRAINING_ROWS_FILE, models.dimensions), cut_s, seed=settings.seed
    )
    reachable = min(1.0, RANKING_DEPTH * len(split.viewer_ids) / max(len(split.videos), 1))
    gates = evaluate_gates(
        ranking[TWO_STAGE],
        ranking[ALL_TIME_POPULARITY],
        heads,
        max_coverage=reachable,
        settings=settings.gates,
        seed=settings.seed,
    )
    result = EvaluationResult(split, ranking, heads, gates, asdict(als.settings))
    write_json(run.evaluation / EVALUATION_FILE, to_json(result))
    return result


def to_json(result: EvaluationResult) -> dict[str, Any]:
    """Returns the content of ``evaluation.json``: metrics (``None`` if undefined), intervals, gates and baselines."""
    candidate = result.ranking[TWO_STAGE]
    metrics: dict[str, float | None] = {"coverage_at_50": candidate.coverage}
    intervals: dict[str, Any] = {}
    for name, estimate in candidate.estimates.items():
        plain = estimate.to_dict()
        metrics[name], intervals[name] = plain["value"], plain
    for head in result.heads:
        if not head.defined:
            continue
        for measure in ("auc", "log_loss", "error_before", "error_after"):
            estimate = getattr(head, measure).to_dict()
            metrics[f"{head.task}_{measure}"], intervals[f"{head.task}_{measure}"] = estimate["value"], estimate
    return {
        "metrics": metrics,
        "intervals": intervals,
        "gates": [gate.model_dump(mode="json") for gate in result.gates],
        "baselines": {
            name: {
                "coverage_at_50": ranking_metrics.coverage,
                **{metric: estimate.to_dict() for metric, estimate in ranking_metrics.estimates.items()},
            }
            for name, ranking_metrics in result.ranking.items()
            if name != TWO_STAGE
        },
        "question": {
            "cut_s": result.split.cut_s,
            "viewers": len(result.split.viewer_ids),
            "videos": len(result.split.videos),
            "als": result.als,
        },
    }
