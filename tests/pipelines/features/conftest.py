"""A built feature store of a small data set, built once per session without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.dimensions import DIMENSIONS
from tests.pipelines.features.event_tables import random_dataset, write_dataset

from reelway.pipelines.features import views
from reelway.pipelines.features.batch import ENTITY_KEYS, data_end_us, entity_views
from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.training_rows import CATALOGUE_FILE, LABELS_FILE
from reelway.platform.run_directory import RunDirectory


@dataclass(frozen=True)
class Built:
    """A run with built, registered features, materialised as of ``until_s``."""

    run: RunDirectory
    tables: dict[str, pa.Table]
    labels: pa.Table
    until_s: float


def write_views(run: RunDirectory, tables: dict[str, pa.Table], settings: views.ViewSettings) -> tuple[pa.Table, int]:
    """Writes in one process the files that the batch job writes."""
    write_dataset(run.dataset, tables)
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    until_us = data_end_us(labels)
    made = {
        "viewer_profile": views.viewer_profile(tables["viewers"]),
        "video_content": views.video_content(tables["videos"]),
    }
    for family in ENTITY_KEYS:
        made |= entity_views(family, labels, (tables["creators"], tables["videos"]), settings, until_us)
    for name, table in made.items():
        folder = run.features / "views" / name
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "bucket-0000.parquet")
    pq.write_table(labels, run.features / LABELS_FILE)
    pq.write_table(
        tables["videos"].select(["video_id", "creator_id", "uploaded_at", "title"]), run.features / CATALOGUE_FILE
    )
    return labels, until_us


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    run = RunDirectory(tmp_path_factory.mktemp("features") / "run")
    tables = random_dataset()
    labels, until_us = write_views(run, tables, views.ViewSettings(DIMENSIONS))
    register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, until_us / 1e6)
    return Built(run, tables, labels, until_us / 1e6)


@pytest.fixture
def changed(built: Built, tmp_path: Path) -> Callable[[str, Callable[[pa.Table], pa.Table]], RunDirectory]:
    """Returns a copy of the built run in which one view's offline rows are changed."""

    def change(view: str, edit: Callable[[pa.Table], pa.Table]) -> RunDirectory:
        run = RunDirectory(tmp_path / "changed")
        shutil.copytree(built.run.path, run.path)
        path = run.features / "views" / view / "bucket-0000.parquet"
        pq.write_table(edit(pq.read_table(path)), path)
        register_features(run.features, DIMENSIONS, "sqlite")
        return run

    return change
