"""Retrieval: filters and blends the proposals of all sources into one list of candidates.

Retrieval does not order candidates by value; ranking does.

| source     | proposes                                                | file of the release |
|------------|---------------------------------------------------------|---------------------|
| ann        | videos nearest to the viewer's embedding                | index.faiss         |
| neighbours | item-to-item neighbours of recently watched videos      | neighbours.arrow    |
| trending   | videos that rise now, those of the viewer's region first | popular.arrow       |
| popular    | the most watched videos                                 | popular.arrow       |
| fresh      | new uploads                                             | videos.arrow        |
"""

# Shapes: P proposals, C candidates, D embedding

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from reelway.platform.contracts.blend import RetrievalSettings, SourceName
from reelway.platform.errors import ServingError
from reelway.serving.onnx_model import OnnxModel
from reelway.serving.stages.arrays import SOURCE_CODES, Candidates, ViewerQuery
from reelway.serving.stages.blending import blend, whole_quotas
from reelway.serving.stages.filtering import allowed_candidates
from reelway.serving.stages.sources import CandidateSource, SourceQuery
from reelway.serving.video_table import VideoTable


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
        self._sources = [sources[name] for name in settings.quotas]
        self._codes = np.array([SOURCE_CODES[name] for name in settings.quotas], dtype=np.int8)
        self._quotas = whole_quotas(list(settings.quotas.values()), settings.candidates)
        self._candidates = settings.candidates

    def retrieve(self, query: ViewerQuery) -> Candidates:
        """Returns at most ``settings.candidates`` distinct videos that may be shown to this viewer."""
        embedding = self._tower.run(query.arrays.as_inputs())
        limit = self._candidates + len(query.history_rows)
        source_query = SourceQuery(query, embedding, limit)
        proposals = [source.propose(source_query) for source in self._sources]

        rows_P = self._table.servable_rows(np.concatenate([p.rows for p in proposals]))
        source_P = np.repeat(np.arange(len(proposals)), [len(p.rows) for p in proposals])
        similarity_P = np.concatenate(
            [np.zeros(len(p.rows), np.float32) if p.similarity is None else p.similarity for p in proposals]
        )
        trigger_rows_P = np.concatenate(
            [np.full(len(p.rows), -1, np.int32) if p.trigger_rows is None else p.trigger_rows for p in proposals]
        )

        may_show_P, filtered_counts = allowed_candidates(rows_P, query)
        passed = np.flatnonzero(may_show_P)
        videos, video_of_passed = np.unique(rows_P[passed], return_inverse=True)
        blended = blend(video_of_passed, source_P[passed], self._quotas)
        chosen = passed[blended]
        is_chosen = np.zeros(len(videos), dtype=np.bool_)
        is_chosen[video_of_passed[blended]] = True
        of_chosen_videos = int(np.count_nonzero(is_chosen[video_of_passed]))
        filtered_counts["duplicate"] = of_chosen_videos - len(chosen)
        filtered_counts["over_quota"] = len(passed) - of_chosen_videos
        return Candidates(
            rows=rows_P[chosen],
            source=self._codes[source_P[chosen]],
            similarity=similarity_P[chosen].astype(np.float32),
            trigger_rows=trigger_rows_P[chosen],
            viewer_embedding=embedding,
            filtered_counts=filtered_counts,
        )
