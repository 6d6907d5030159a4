"""The popularity lists of a release: most watched and trending videos.

Every router holds the lists in its own memory. They are the last fallback: a viewer gets a slate from them even if no
stage answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelway.platform.contracts.manifest import POPULAR_FILE
from reelway.platform.contracts.release_files import POPULAR_SCHEMA
from reelway.platform.errors import IncompatibleReleaseError
from reelway.serving.stages.arrays import F32, SOURCE_CODES, Candidates, Rows, ViewerQuery
from reelway.serving.stages.filtering import allowed_candidates
from reelway.serving.video_table import ABSENT, VideoTable, open_record_batch

_REGIONAL: Final = "trending:"


class PopularLists:
    """The lists as rows of the video table, best first; videos that the table lacks are left out."""

    def __init__(self, popular: Rows, trending: Rows, trending_in: Mapping[str, Rows], table: VideoTable) -> None:
        self.popular = popular
        self.trending = trending
        self.trending_in = dict(trending_in)
        self._members = {region: frozenset(rows.tolist()) for region, rows in trending_in.items()}
        self._table = table
        self._no_embedding: F32 = np.zeros((1, table.embedding.shape[1]), dtype=np.float32)

    def is_trending_in(self, row: int, region: str | None) -> bool:
        """Whether the video is on the region's own trending list."""
        return region is not None and row in self._members.get(region, ())

    def candidates(self, query: ViewerQuery) -> Candidates:
        """Returns the popular list as candidates, without videos of the viewer's history and without takedowns."""
        popular = self._table.servable_rows(self.popular)
        may_show, filtered_counts = allowed_candidates(popular, query)
        rows = popular[may_show]
        return Candidates(
            rows=rows,
            source=np.full(len(rows), SOURCE_CODES["popular"], dtype=np.int8),
            similarity=np.zeros(len(rows), dtype=np.float32),
            trigger_rows=np.full(len(rows), -1, dtype=np.int32),
            viewer_embedding=self._no_embedding,
            filtered_counts=filtered_counts,
        )


def open_popular_lists(folder: Path, table: VideoTable) -> PopularLists:
    """Reads ``popular.arrow`` of a release.

    Raises:
        IncompatibleReleaseError: if the schema differs, or no list is named ``popular``.
    """
    path = folder / POPULAR_FILE
    batch = open_record_batch(path)
    if not batch.schema.equals(POPULAR_SCHEMA):
        raise IncompatibleReleaseError(
            f"{path} has schema\n{batch.schema}\nexpected\n{POPULAR_SCHEMA}\nrebuild the release"
        )
    lists = pa.Table.from_batches([batch]).sort_by([("list", "ascending"), ("rank", "ascending")])
    rows: dict[str, Rows] = {}
    for name in pc.unique(lists["list"]).to_pylist():
        videos = lists.filter(pc.equal(lists["list"], name))["video_id"].to_numpy()
        known_rows = table.rows_of(videos)
        rows[name] = known_rows[known_rows != ABSENT]
    if "popular" not in rows:
        raise IncompatibleReleaseError(
            f"{path}: saw lists {sorted(rows)}, expected one named 'popular'; rebuild the release"
        )
    regions = {
        name.removeprefix(_REGIONAL): known_rows for name, known_rows in rows.items() if name.startswith(_REGIONAL)
    }
    return PopularLists(rows["popular"], rows.get("trending", rows["popular"][:0]), regions, table)
