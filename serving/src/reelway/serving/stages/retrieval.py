"""Retrieval: all sources, filtered and blended into one list of candidates. It orders nothing by value.

| source     | proposes                                             | file of the release    |
|------------|------------------------------------------------------|------------------------|
| ann        | videos nearest to the viewer's embedding             | index.faiss            |
| neighbours | what goes with the videos watched lately             | neighbours.arrow       |
| trending   | what rises now, in the viewer's region first         | popular.arrow          |
| popular    | what most viewers watch                              | popular.arrow          |
| fresh      | new uploads                                          | videos.arrow           |
"""

# Shapes: P proposals, C candidates, D embedding

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from reelway.platform.contracts.blend import RetrievalBlend, SourceName
from reelway.platform.errors import ServingError
from reelway.serving.sessions import Graph
from reelway.serving.stages.arrays import SOURCE_CODES, Candidates, ViewerQuery
from reelway.serving.stages.blending import blend, whole_quotas
from reelway.serving.stages.filtering import allowed
from reelway.serving.stages.sources import Ask, Source


class Retrieval:
    """The stage: ``retrieve`` is the whole of it.

    Args:
        tower: ``viewer_tower.onnx``.
        sources: by name; every source that has a quota must be there.
        settings: how many candidates, and from where. The order of its quotas is the order of precedence.
    """

    def __init__(self, tower: Graph, sources: Mapping[SourceName, Source], settings: RetrievalBlend) -> None:
        if missing := sorted(set(settings.quotas) - set(sources)):
            raise ServingError(f"retrieval.quotas names {missing}, expected sources among {sorted(sources)}")
        self._tower = tower
        self._sources = [sources[name] for name in settings.quotas]
        self._codes = np.array([SOURCE_CODES[name] for name in settings.quotas], dtype=np.int8)
        self._quotas = whole_quotas(list(settings.quotas.values()), settings.candidates)
        self._candidates = settings.candidates

    def retrieve(self, query: ViewerQuery) -> Candidates:
        """At most ``candidates`` videos that may be shown to this viewer, none of them twice."""
        embedding = self._tower.run(query.arrays.as_inputs())
        wanted = self._candidates + len(query.history_rows)
        ask = Ask(query, embedding, wanted)
        proposals = [source.propose(ask) for source in self._sources]

        rows_P = np.concatenate([p.rows for p in proposals])
        source_P = np.repeat(np.arange(len(proposals)), [len(p.rows) for p in proposals])
        similarity_P = np.concatenate(
            [np.zeros(len(p.rows), np.float32) if p.similarity is None else p.similarity for p in proposals]
        )
        because_P = np.concatenate(
            [np.full(len(p.rows), -1, np.int32) if p.because is None else p.because for p in proposals]
        )

        may_show_P, left = allowed(rows_P, query)
        kept = np.flatnonzero(may_show_P)
        videos, video_of_kept = np.unique(rows_P[kept], return_inverse=True)
        blended = blend(video_of_kept, source_P[kept], self._quotas)
        chosen = kept[blended]
        is_chosen = np.zeros(len(videos), dtype=np.bool_)
        is_chosen[video_of_kept[blended]] = True
        again = int(np.count_nonzero(is_chosen[video_of_kept]))
        left["duplicate"] = again - len(chosen)
        left["over_quota"] = len(kept) - again
        return Candidates(
            rows=rows_P[chosen],
            source=self._codes[source_P[chosen]],
            similarity=similarity_P[chosen].astype(np.float32),
            because=because_P[chosen],
            viewer_embedding=embedding,
            left=left,
        )
