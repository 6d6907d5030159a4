"""A built feature store of a small data set, built once per session without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset
from tests.support.pipelines.view_files import write_views

from reelway.pipelines.features import views
from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
from reelway.platform.atomic_files import write_json
from reelway.platform.run_directory import RunDirectory


@dataclass(frozen=True)
class Built:
    """A run with built, registered features, materialised as of ``until_s``."""

    run: RunDirectory
    tables: dict[str, pa.Table]
    labels: pa.Table
    until_s: float


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    run = RunDirectory(tmp_path_factory.mktemp("features") / "run")
    tables = random_dataset()
    write_json(run.record_path("features"), {"config": {"views": asdict(views.ViewSettings(DIMENSIONS))}})
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
