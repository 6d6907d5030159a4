"""Writes the files of the batch job in one process."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from tests.support.pipelines.event_tables import write_dataset

from reelway.pipelines.features import views
from reelway.pipelines.features.batch import ENTITY_KEYS, data_end_us, entity_views
from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.training_rows import CATALOGUE_FILE, LABELS_FILE
from reelway.platform.run_directory import RunDirectory


def write_views(run: RunDirectory, tables: dict[str, pa.Table], settings: views.ViewSettings) -> tuple[pa.Table, int]:
    """Writes in one process the files that the batch job writes."""
    write_dataset(run.dataset, tables)
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    until_us = data_end_us(labels)
    view_tables = {
        "viewer_profile": views.viewer_profile(tables["viewers"]),
        "video_content": views.video_content(tables["videos"]),
    }
    for family in ENTITY_KEYS:
        view_tables |= entity_views(family, labels, (tables["creators"], tables["videos"]), settings, until_us)
    for name, table in view_tables.items():
        folder = run.features / "views" / name
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "bucket-0000.parquet")
    pq.write_table(labels, run.features / LABELS_FILE)
    pq.write_table(
        tables["videos"].select(["video_id", "creator_id", "uploaded_at", "title"]), run.features / CATALOGUE_FILE
    )
    return labels, until_us
