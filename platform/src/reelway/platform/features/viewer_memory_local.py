"""Viewer memory of one process, for simulations and benchmarks that run the request path without a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from reelway.platform.features.viewer_memory import (
    F64,
    I64,
    MAX_CHOICES,
    ShownSlate,
    ViewerMemoryState,
    memory_state,
    pack_shown,
    trim_shown,
)
from reelway.platform.features.watched_filter import add_to_filter, live_generations, positions_by_filter

_CREATOR, _TOPIC = "creator", "topic"
_Choice = TypeVar("_Choice")


class LocalViewerMemory:
    """``ViewerMemory`` in dictionaries. Not for several threads.

    Args:
        clock: current time in Unix seconds; simulations pass the simulated time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._shown: dict[int, bytes] = {}
        self._watched: dict[int, dict[int, bytes]] = {}
        self._blocked: dict[int, dict[tuple[str, int], None]] = {}  # kind and id, in the order of the reports
        self._followed: dict[int, dict[int, None]] = {}
        self._complete = False

    def read(self, viewer_id: int) -> ViewerMemoryState:
        live = live_generations(self._clock())
        filters = [(g, bits) for g, bits in self._watched.get(viewer_id, {}).items() if g >= live.start]
        blocked = self._blocked.get(viewer_id, {})
        return memory_state(
            self._shown.get(viewer_id, b""),
            filters,
            [id_ for kind, id_ in blocked if kind == _CREATOR],
            [id_ for kind, id_ in blocked if kind == _TOPIC],
            self._followed.get(viewer_id, ()),
        )

    def remember_shown(self, viewer_id: int, video_ids: Sequence[int] | I64, shown_at_s: float) -> None:
        packed = self._shown.get(viewer_id, b"") + pack_shown(video_ids, shown_at_s)
        self._shown[viewer_id] = trim_shown(packed, self._clock())

    def remember_slates(self, slates: Sequence[ShownSlate]) -> None:
        for slate in slates:
            self.remember_shown(*slate)

    def restore_shown(self, viewer_id: int, video_ids: I64, shown_at_s: F64) -> None:
        packed = pack_shown(video_ids, shown_at_s) + self._shown.get(viewer_id, b"")
        self._shown[viewer_id] = trim_shown(packed, self._clock())

    def remember_watched(self, viewer_ids: I64, video_ids: I64, watched_at_s: F64) -> None:
        for viewer_id, generation, positions in positions_by_filter(viewer_ids, video_ids, watched_at_s):
            filters = self._watched.setdefault(viewer_id, {})
            filters[generation] = add_to_filter(filters.get(generation, b""), positions)

    def block(self, viewer_id: int, *, creators: Sequence[int] = (), topics: Sequence[int] = ()) -> None:
        blocks = [(_CREATOR, int(id_)) for id_ in creators] + [(_TOPIC, int(id_)) for id_ in topics]
        _add_choices(self._blocked.setdefault(viewer_id, {}), blocks)

    def follow(self, viewer_id: int, creators: Sequence[int]) -> None:
        _add_choices(self._followed.setdefault(viewer_id, {}), [int(creator) for creator in creators])

    def count_entries(self, viewer_id: int) -> int:
        return sum(viewer_id in stored for stored in self._stored())

    def forget(self, viewer_id: int) -> int:
        return sum(stored.pop(viewer_id, None) is not None for stored in self._stored())

    def is_complete(self) -> bool:
        return self._complete

    def mark_complete(self) -> None:
        self._complete = True

    def _stored(self) -> tuple[dict[int, Any], ...]:
        return self._shown, self._watched, self._blocked, self._followed


def _add_choices(kept: dict[_Choice, None], choices: Sequence[_Choice]) -> None:
    """Moves the choices to the end and removes surplus choices from the beginning."""
    for choice in choices:
        kept.pop(choice, None)
        kept[choice] = None
    for choice in list(kept)[: max(len(kept) - MAX_CHOICES, 0)]:
        del kept[choice]
