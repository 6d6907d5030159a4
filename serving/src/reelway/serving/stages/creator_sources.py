"""The sources by creator: videos of followed creators, and of creators that resemble those of liked videos.

A creator is proposed with the newest videos and the best videos in turn. All look-ups are gathers in matrices with one
row per creator of the release.
"""

# Shapes: C creators, V videos per creator, F creators of one query, P proposals

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from reelway.platform.contracts.manifest import CREATORS_FILE, VIDEOS_FILE
from reelway.platform.contracts.release_files import CREATORS_SCHEMA, VIDEOS_PER_CREATOR
from reelway.platform.errors import IncompatibleReleaseError
from reelway.serving.stages.arrays import I64, Rows
from reelway.serving.stages.sources import NO_ROWS, SourceCandidates, SourceQuery
from reelway.serving.video_table import ABSENT, VideoTable, open_record_batch

LIKED_CREATORS: Final = 10
"""Number of creators of the latest liked videos whose similar creators are proposed."""
SIMILAR: Final = 20
"""Number of similar creators whose videos are proposed."""
LATER_UPLOADS: Final = 5_000
"""Newest uploads since the release was built among which those of followed creators are looked for."""


class CreatorVideos:
    """Each creator's newest and best videos as rows of the video table, and the similar creators.

    Args:
        table: video table of the release.
        creator_id: creators of ``creators.arrow``, ascending, ``[C]``.
        similar: positions in ``creator_id``, ``[C, K]``, padded with ``ABSENT``.
        best: rows of the table, ``[C, V]``, padded with ``ABSENT``.
    """

    def __init__(self, table: VideoTable, creator_id: I64, similar: Rows, best: Rows) -> None:
        self._table = table
        self._creator_id = creator_id
        self.similar = similar
        self.of_row = _positions(creator_id, table.creator_id.base)  # [N] ABSENT for a video without a creator
        newest = _newest_videos(table, creator_id)
        # newest, best, second newest, second best, ...
        self._videos: Rows = np.stack([newest, best], axis=2).reshape(len(creator_id), 2 * VIDEOS_PER_CREATOR)

    def __len__(self) -> int:
        return len(self._creator_id)

    def positions_of(self, creators: I64) -> Rows:
        """Returns the positions of those creators that the release has, in the given order."""
        position = _positions(self._creator_id, creators)
        known: Rows = position[position != ABSENT]
        return known

    def by_newest_upload(self, positions: Rows) -> Rows:
        """Returns the creators in the order of their newest videos, newest first. Shapes: ``[F] -> [F]``."""
        newest = self._videos[positions, 0]
        return positions[np.argsort(-np.nan_to_num(self._table.uploaded_at_s[newest]), kind="stable")]

    def videos_of(self, positions: Rows, now_s: float) -> Rows:
        """Returns videos uploaded by ``now_s``, one of every creator in turn. Shapes: ``[F] -> [P]``."""
        rows: Rows = self._videos[positions].T.ravel()
        rows = rows[rows != ABSENT]
        uploaded: Rows = rows[~(self._table.uploaded_at_s[rows] > now_s)]
        return uploaded

    def later_uploads_of(self, creators: I64, now_s: float) -> Rows:
        """Returns the creators' videos uploaded since the release was built and by ``now_s``, newest first."""
        rows = self._table.uploads.newest_first[:LATER_UPLOADS]
        rows = rows[np.isin(self._table.creator_id[rows], creators)]
        uploaded: Rows = rows[~(self._table.uploaded_at_s[rows] > now_s)]
        return uploaded


class FollowedCreatorsSource:
    """Proposes videos of the creators that the viewer follows, the creator with the newest upload first."""

    def __init__(self, creators: CreatorVideos) -> None:
        self._creators = creators

    def propose(self, query: SourceQuery) -> SourceCandidates:
        viewer = query.viewer
        if not len(viewer.followed_creators):
            return SourceCandidates(NO_ROWS)
        later = self._creators.later_uploads_of(viewer.followed_creators, viewer.now_s)
        followed = self._creators.by_newest_upload(self._creators.positions_of(viewer.followed_creators))
        rows = np.concatenate([later, self._creators.videos_of(followed, viewer.now_s)])
        return SourceCandidates(rows[: query.limit])


class SimilarCreatorsSource:
    """Proposes videos of creators that resemble the creators of the videos that this viewer liked most recently.

    Creators whose videos the viewer liked or whom the viewer follows are left out.
    """

    def __init__(self, creators: CreatorVideos) -> None:
        self._creators = creators

    def propose(self, query: SourceQuery) -> SourceCandidates:
        viewer, creators = query.viewer, self._creators
        liked_rows = viewer.history_rows[viewer.history_weights > 0]
        of_liked = creators.of_row[liked_rows[liked_rows < len(creators.of_row)]][::-1]  # latest first
        of_liked = of_liked[of_liked != ABSENT]
        if not len(of_liked):
            return SourceCandidates(NO_ROWS)
        similar = creators.similar[_distinct(of_liked)[:LIKED_CREATORS]].T.ravel()  # the best of every creator first
        is_new = np.ones(len(creators), dtype=np.bool_)
        is_new[of_liked] = False
        is_new[creators.positions_of(viewer.followed_creators)] = False
        similar = similar[similar != ABSENT]
        similar = _distinct(similar[is_new[similar]])[:SIMILAR]
        return SourceCandidates(creators.videos_of(similar, viewer.now_s)[: query.limit])


def open_creator_videos(folder: Path, table: VideoTable) -> CreatorVideos:
    """Reads ``creators.arrow`` of a release.

    Raises:
        IncompatibleReleaseError: if the schema or the creators differ from those of the video table.
    """
    path = folder / CREATORS_FILE
    batch = open_record_batch(path)
    if not batch.schema.equals(CREATORS_SCHEMA):
        raise IncompatibleReleaseError(
            f"{path} has schema\n{batch.schema}\nexpected\n{CREATORS_SCHEMA}\nrebuild the release"
        )
    creator_id: I64 = batch.column("creator_id").to_numpy()
    if not np.array_equal(creator_id, np.unique(table.creator_id.base[table.creator_id.base >= 0])):
        raise IncompatibleReleaseError(f"{path}: the creators differ from those of {VIDEOS_FILE}; rebuild the release")
    similar, best = (
        batch.column(name).flatten().to_numpy().reshape(len(creator_id), CREATORS_SCHEMA.field(name).type.list_size)
        for name in ("similar", "best")
    )
    return CreatorVideos(table, creator_id, similar, best)


def _positions(creator_id: I64, creators: I64) -> Rows:
    """Returns the positions of the creators in ``creator_id``, which ascends; ``ABSENT`` for others."""
    if not len(creator_id):
        return np.full(len(creators), ABSENT, dtype=np.int32)
    position = np.minimum(np.searchsorted(creator_id, creators), len(creator_id) - 1)
    return np.where(creator_id[position] == creators, position, ABSENT).astype(np.int32)


def _distinct(positions: Rows) -> Rows:
    """Returns the distinct positions in the order of their first occurrence."""
    return positions[np.sort(np.unique(positions, return_index=True)[1])]


def _newest_videos(table: VideoTable, creator_id: I64) -> Rows:
    """Returns the rows of each creator's newest videos in the release, ``[C, V]``, padded with ``ABSENT``."""
    order = np.lexsort((-np.nan_to_num(table.uploaded_at_s.base, nan=-np.inf), table.creator_id.base))
    order = order[table.creator_id.base[order] >= 0]
    code = np.searchsorted(creator_id, table.creator_id.base[order])
    rank = np.arange(len(code)) - np.searchsorted(code, code, side="left")
    selected = rank < VIDEOS_PER_CREATOR
    rows = np.full((len(creator_id), VIDEOS_PER_CREATOR), ABSENT, dtype=np.int32)
    rows[code[selected], rank[selected]] = order[selected]
    return rows
