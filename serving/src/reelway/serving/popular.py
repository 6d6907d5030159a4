"""The lists of a release that need no viewer: all-time popular and rising now. They are also the last rung.

A router keeps them in its own memory, so that a viewer gets a slate when no other stage answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelway.platform.contracts.manifest import POPULAR_FILE
from reelway.platform.contracts.release_files import POPULAR
from reelway.platform.errors import IncompatibleReleaseError
from reelway.serving.stages.arrays import F32, SOURCE_CODES, Candidates, Rows, ViewerQuery
from reelway.serving.stages.filtering import allowed
from reelway.serving.video_table import ABSENT, VideoTable, open_one_batch

_REGIONAL: Final = "trending:"


class PopularLists:
    """Rows of the video table, best first; videos that the table doesn't have are left out."""

    def __init__(self, popular: Rows, trending: Rows, trending_in: Mapping[str, Rows], embedding_dim: int) -> None:
        self.popular = popular
        self.trending = trending
        self.trending_in = dict(trending_in)
        self._members = {region: frozenset(rows.tolist()) for region, rows in trending_in.items()}
        self._no_embedding: F32 = np.zeros((1, embedding_dim), dtype=np.float32)

    def rises_in(self, row: int, region: str | None) -> bool:
        """Whether the video is on the region's own list."""
        return region is not None and row in self._members.get(region, ())

    def candidates(self, query: ViewerQuery) -> Candidates:
        """The popular list as candidates, without what the viewer has seen."""
        may_show, left = allowed(self.popular, query)
        rows = self.popular[may_show]
        return Candidates(
            rows=rows,
            source=np.full(len(rows), SOURCE_CODES["popular"], dtype=np.int8),
            similarity=np.zeros(len(rows), dtype=np.float32),
            because=np.full(len(rows), -1, dtype=np.int32),
            viewer_embedding=self._no_embedding,
            left=left,
        )


def open_popular_lists(folder: Path, table: VideoTable) -> PopularLists:
    """Read ``popular.arrow`` of a release.

    Raises:
        IncompatibleReleaseError: another schema, or no list named ``popular``.
    """
    path = folder / POPULAR_FILE
    batch = open_one_batch(path)
    if not batch.schema.equals(POPULAR):
        raise IncompatibleReleaseError(f"{path} has schema\n{batch.schema}\nexpected\n{POPULAR}\nrebuild the release")
    lists = pa.Table.from_batches([batch]).sort_by([("list", "ascending"), ("rank", "ascending")])
    rows: dict[str, Rows] = {}
    for name in pc.unique(lists["list"]).to_pylist():
        videos = lists.filter(pc.equal(lists["list"], name))["video_id"].to_numpy()
        found = table.rows_of(videos)
        rows[name] = found[found != ABSENT]
    if "popular" not in rows:
        raise IncompatibleReleaseError(f"{path}: saw lists {sorted(rows)}, expected one named 'popular'")
    regions = {name.removeprefix(_REGIONAL): found for name, found in rows.items() if name.startswith(_REGIONAL)}
    return PopularLists(rows["popular"], rows.get("trending", rows["popular"][:0]), regions, table.embedding.shape[1])
