"""Retrieval: filters and blends the proposals of all sources into one list of candidates.

Retrieval does not order candidates by value; ranking does.

| source            | proposes                                               | file                       |
|-------------------|--------------------------------------------------------|----------------------------|
| followed_creators | new and best videos of the creators the viewer follows | creators.arrow             |
| fresh             | new uploads                                            | videos.arrow               |
| trending          | videos that rise now, by region, language and overall  | lists.arrow, popular.arrow |
| popular           | the most watched videos, likewise                      | lists.arrow, popular.arrow |
| neighbours        | item-to-item neighbours of recently liked videos       | neighbours.arrow           |
| content           | videos whose content resembles recently liked videos   | content_neighbours.arrow   |
| similar_creators  | videos of creators like those of recently liked videos | creators.arrow             |
| ann               | videos nearest to the viewer's embedding               | index.faiss                |
"""

# Shapes: P proposals, C candidates, D embedding

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from reelway.platform.contracts.blend import RetrievalSettings, SourceName
from reelway.platform.errors import ServingError
from reelway.platform.features.watched_filter import estimated_count
from reelway.serving.onnx_model import OnnxModel
from reelway.serving.stages.arrays import SOURCE_CODES, Candidates, ViewerQuery
from reelway.serving.stages.blending import blend, whole_quotas
from reelway.serving.stages.exclusion import SearchableRows, completing_rows
from reelway.serving.stages.filtering import allowed_candidates
from reelway.serving.stages.sources import CandidateSource, SourceQuery
from reelway.serving.video_table import VideoTable

_WATCHED_OVERFETCH: Final = 3
"""Most proposals beyond the candidates, as a multiple of them, that replace videos that were watched to the end."""


class Retrieval:
    """The retrieval stage of one release.

    Args:
        tower: the model ``viewer_tower.onnx``.
        sources: name -> source; every source with a quota is required.
        settings: number of candidates and quotas. Earlier quotas take precedence.
        table: the video table. Proposals of replaced rows become the rows that replaced them, and videos that were
            taken down become ``ABSENT``.

    Raises:
        ServingError: if a source with a quota is missing.
    """

    def __init__(
        self,
        tower: OnnxModel,
        sources: Mapping[SourceName, CandidateSource],
        settings: RetrievalSettings,
        table: VideoTable,
    ) -> None:
        if missing := sorted(set(settings.quotas) - set(sources)):
            raise ServingError(
                f"retrieval.quotas: unknown sources {missing}; use sources among {sorted(sources)} in blend.yaml"
            )
        self._tower = tower
        self._table = table
        self._searchable = SearchableRows(table)
        self._sources = [sources[name] for name in settings.quotas]
        self._codes = np.array([SOURCE_CODES[name] for name in settings.quotas], dtype=np.int8)
        self._quotas = whole_quotas(list(settings.quotas.values()), settings.candidates)
        self._candidates = settings.candidates

    def retrieve(self, query: ViewerQuery) -> Candidates:
        """Returns at most ``settings.candidates`` distinct videos that may be shown to this viewer.

        If these are fewer than the requested slate, videos follow that were shown before; see ``completing_rows``.
        """
        embedding = self._tower.run(query.arrays.as_inputs())
        searchable = self._searchable.bits(query.exclusions)
        source_query = SourceQuery(query, embedding, self._limit(query), searchable, self._search_limit(query))
        proposals = [source.propose(source_query) for source in self._sources]

        rows_P = self._table.servable_rows(np.concatenate([p.rows for p in proposals]))
        source_P = np.repeat(np.arange(len(proposals)), [len(p.rows) for p in proposals])
        similarity_P = np.concatenate(
            [np.full(len(p.rows), np.nan, np.float32) if p.similarity is None else p.similarity for p in proposals]
        )
        trigger_rows_P = np.concatenate(
            [np.full(len(p.rows), -1, np.int32) if p.trigger_rows is None else p.trigger_rows for p in proposals]
        )

        may_show_P, filtered_counts = allowed_candidates(rows_P, query, self._table)
        passed = np.flatnonzero(may_show_P)
        videos, video_of_passed = np.unique(rows_P[passed], return_inverse=True)
        blended = blend(video_of_passed, source_P[passed], self._quotas)
        chosen = passed[blended]
        is_chosen = np.zeros(len(videos), dtype=np.bool_)
        is_chosen[video_of_passed[blended]] = True
        of_chosen_videos = int(np.count_nonzero(is_chosen[video_of_passed]))
        filtered_counts["duplicate"] = of_chosen_videos - len(chosen)
        filtered_counts["over_quota"] = len(passed) - of_chosen_videos
        similarity = similarity_P[chosen].astype(np.float32)
        unknown = np.isnan(similarity)
        similarity[unknown] = self._table.embedding.take(rows_P[chosen[unknown]], axis=0) @ embedding[0]
        candidates = Candidates(
            rows=rows_P[chosen],
            source=self._codes[source_P[chosen]],
            similarity=similarity,
            trigger_rows=trigger_rows_P[chosen],
            viewer_embedding=embedding,
            filtered_counts=filtered_counts,
        )
        if len(candidates) >= query.count:
            return candidates
        rows = completing_rows(candidates.rows, query, self._table)
        return candidates.followed_by(rows, self._table.embedding.take(rows))

    def _limit(self, query: ViewerQuery) -> int:
        """Returns how many videos a source may propose: enough for all candidates after the filters."""
        exclusions = query.exclusions
        limit = self._candidates + len(query.history_rows) + len(exclusions.shown_rows)
        has_blocks = len(exclusions.blocked_creators) or len(exclusions.blocked_topics)
        return limit + self._candidates if has_blocks else limit

    def _search_limit(self, query: ViewerQuery) -> int:
        """Returns the same for an index search, which leaves out shown and blocked videos itself.

        The nearest videos are those that the viewer watched, so a search returns more to replace these.
        """
        watched = min(estimated_count(query.exclusions.watched), _WATCHED_OVERFETCH * self._candidates)
        return self._candidates + len(query.history_rows) + watched
