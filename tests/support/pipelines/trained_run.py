"""A run directory that is ready for ``reelway release build``: data set, features, models, evaluation.

The models have random weights, which costs no training and changes nothing about building; all else is real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import START_US, random_dataset, write_dataset

from reelway.pipelines.features.batch import VIEWS_FOLDER, data_end_us, entity_views
from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.training_rows import CATALOGUE_FILE, LABELS_FILE
from reelway.pipelines.features.views import ViewSettings, video_content, viewer_profile
from reelway.pipelines.models.ranker import Ranker, RankerConfig
from reelway.pipelines.models.two_tower import TwoTower, TwoTowerConfig
from reelway.pipelines.training.artifacts import TrainedModels, TrainingInfo, save_models
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.calibration import Calibration, CalibrationCurve
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.run_directory import RunDirectory

DIM = 16


def make_trained_run(path: Path, *, requests: int = 300, gates: list[dict[str, Any]] | None = None) -> RunDirectory:
    """Writes all inputs of ``build_release``, and the step records that the command requires."""
    run = RunDirectory(path)
    tables = random_dataset(requests=requests)
    write_dataset(run.dataset, tables)
    write_features(run, tables, DIMENSIONS)
    write_random_models(run.models)
    write_evaluation(run, gates=gates)
    for step in ("features", "train", "evaluate"):
        with run.step(step, config={"purpose": "tests"}):
            pass
    return run


def write_evaluation(run: RunDirectory, gates: list[dict[str, Any]] | None = None, **metrics: Any) -> None:
    """Writes ``evaluation.json``, by default with one passed gate."""
    holds = [{"name": "recall_at_50", "value": 0.4, "bound": 0.3, "comparison": ">=", "passed": True, "detail": ""}]
    values = {"recall_at_50": 0.4, "auc_share": None} | metrics
    write_json(run.evaluation / "evaluation.json", {"metrics": values, "gates": holds if gates is None else gates})


def write_features(run: RunDirectory, tables: dict[str, pa.Table], dimensions: FeatureDimensions) -> None:
    """Writes labels, catalogue and views and registers them with Feast, as `reelway features` does with Ray."""
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    run.features.mkdir(parents=True)
    pq.write_table(labels, run.features / LABELS_FILE)
    catalogue = tables["videos"].select(["video_id", "creator_id", "uploaded_at", "title"])
    pq.write_table(catalogue, run.features / CATALOGUE_FILE)
    creators = (tables["creators"], tables["videos"].select(["creator_id", "uploaded_at"]))
    views = {"viewer_profile": viewer_profile(tables["viewers"]), "video_content": video_content(tables["videos"])}
    for family in ("viewer", "video", "creator"):
        views |= entity_views(family, labels, creators, ViewSettings(dimensions), data_end_us(labels))
    for name, view in views.items():
        folder = run.features / VIEWS_FOLDER / name
        folder.mkdir(parents=True)
        pq.write_table(view, folder / "part.parquet")
    register_features(run.features, dimensions)


def write_random_models(folder: Path) -> None:
    """Writes untrained models of the smallest kinds."""
    torch.manual_seed(0)
    two_tower, ranker = (
        TwoTower(TwoTowerConfig(dim=DIM), DIMENSIONS),
        Ranker(RankerConfig(kind="shared_bottom"), DIM, DIMENSIONS),
    )
    curve = CalibrationCurve(method="platt", probability=(0.0, 0.5, 1.0), rate=(0.0, 0.4, 1.0))
    info = TrainingInfo(
        seed=3, window_start_s=START_US / 1e6, window_end_s=START_US / 1e6 + 10 * 86_400,
        calibration_start_s=START_US / 1e6 + 9 * 86_400, config={"dim": DIM}, curves={}, base_rates={},
        calibration=[], notes=["share had one class only"], rows={}, elapsed_s={},
    )  # fmt: skip
    save_models(TrainedModels(two_tower.eval(), ranker.eval(), Calibration(curves={"like": curve}), info), folder)
