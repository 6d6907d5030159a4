"""The popularity lists of a release: most watched and trending videos.

Every router holds the lists in its own memory. They are the last fallback: a viewer gets a slate from them even if no
stage answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelway.platform.contracts.manifest import POPULAR_FILE
from reelway.platform.contracts.release_files import POPULAR_SCHEMA
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.eventlog.live_lists_file import POPULAR, TRENDING
from reelway.serving.stages.arrays import F32, SOURCE_CODES, Candidates, Rows, ViewerQuery
from reelway.serving.stages.exclusion import completing_rows
from reelway.serving.stages.filtering import allowed_candidates
from reelway.serving.video_table import ABSENT, VideoTable, open_record_batch

_REGIONAL: Final = "trending:"


@dataclass(frozen=True)
class ListRows:
    """The rows of one kind of list, best first: for all viewers, and for those of a region or language."""

    of_all: Rows
    by_region: Mapping[str, Rows] = field(default_factory=dict)
    by_language: Mapping[str, Rows] = field(default_factory=dict)

    def for_viewer(self, region: str | None, language: str | None) -> Rows:
        """Returns the list of the region, then that of the language, then that of all viewers, as one list.

        A video may be repeated.
        """
        parts = [
            rows
            for rows in (self.by_region.get(region or ""), self.by_language.get(language or ""), self.of_all)
            if rows is not None
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class PopularLists:
    """The lists as rows of the video table, best first; videos that the table lacks are left out.

    Args:
        popular: most watched videos.
        trending: videos that rise now.
        table: video table of the release.
        as_of_s: time that the lists describe, in Unix seconds; None: that of the release.
    """

    def __init__(self, popular: ListRows, trending: ListRows, table: VideoTable, as_of_s: float | None = None) -> None:
        self.popular = popular.of_all
        self.by_kind = {POPULAR: popular, TRENDING: trending}
        self.as_of_s = as_of_s
        self._members = {region: frozenset(rows.tolist()) for region, rows in trending.by_region.items()}
        self._table = table
        self._no_embedding: F32 = np.zeros((1, table.embedding.shape[1]), dtype=np.float32)

    def is_trending_in(self, row: int, region: str | None) -> bool:
        """Whether the video is on the region's own trending list."""
        return region is not None and row in self._members.get(region, ())

    def candidates(self, query: ViewerQuery) -> Candidates:
        """Returns the popular list as candidates, without takedowns and without what the viewer has seen.

        See also ``completing_rows``.
        """
        popular = self._table.servable_rows(self.popular)
        may_show, filtered_counts = allowed_candidates(popular, query, self._table)
        rows = popular[may_show]
        rows = np.concatenate([rows, completing_rows(rows, query, self._table)])
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
    if POPULAR not in rows:
        raise IncompatibleReleaseError(
            f"{path}: saw lists {sorted(rows)}, expected one named 'popular'; rebuild the release"
        )
    regions = {
        name.removeprefix(_REGIONAL): known_rows for name, known_rows in rows.items() if name.startswith(_REGIONAL)
    }
    trending = ListRows(rows.get(TRENDING, rows[POPULAR][:0]), regions)
    return PopularLists(ListRows(rows[POPULAR]), trending, table)
