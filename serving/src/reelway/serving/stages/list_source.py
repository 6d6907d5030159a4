"""The source of popular or trending videos, from the lists that are current at the request."""

from __future__ import annotations

from reelway.serving.live_lists import CurrentLists
from reelway.serving.stages.sources import SourceCandidates, SourceQuery


class ListSource:
    """Proposes one kind of list: that of the viewer's region, then of the language, then of all viewers.

    Args:
        lists: lists of the release.
        kind: ``popular`` or ``trending``.
    """

    def __init__(self, lists: CurrentLists, kind: str) -> None:
        self._lists = lists
        self._kind = kind

    def propose(self, query: SourceQuery) -> SourceCandidates:
        viewer = query.viewer
        rows = self._lists.current().by_kind[self._kind].for_viewer(viewer.region, viewer.language)
        return SourceCandidates(rows[: query.limit])
