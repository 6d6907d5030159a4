"""What the service remembers of a viewer between two slates: shown videos, watched videos and blocks.

- *Shown*: the newest ``MAX_SHOWN_VIDEOS`` videos of the last ``MAX_SHOWN_HOURS`` hours, with their times. A release
  decides in ``blend.yaml`` for how long and how many of them it leaves out.
- *Watched to the end*: a Bloom filter per viewer and generation (``watched_filter``).
- *Blocked* creators and topics, and *followed* creators: they do not expire. Of blocks and of follows, the
  ``MAX_CHOICES`` that were reported last are kept, so that no viewer's memory grows without a bound.

The memory is stored where the viewer's row is: in Redis (``viewer_memory_redis``), or in a SQLite file beside Feast's
(``viewer_memory_sqlite``). It is a copy of what the event log holds. A marker says that the copy is complete; a store
that lost its data has no marker, and the stream rebuilds the memory from the log.
"""

# Shapes: S shown videos, G generations of the watched filter, N reported watches

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import MAX_SHOWN_HOURS, MAX_SHOWN_VIDEOS
from reelway.platform.errors import DataError
from reelway.platform.features.watched_filter import FILTER_BYTES

if TYPE_CHECKING:
    from feast import FeatureStore

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

MAX_CHOICES: Final = 2_000
"""Most blocks of one viewer, creators and topics together, and most follows."""
MEMORY_FILE: Final = "viewer_memory.db"
SHOWN_ENTRY: Final = np.dtype([("video_id", "<i8"), ("shown_at_s", "<u4")])
"""One shown video as it is stored, 12 bytes. A viewer's entries follow each other, oldest first."""
NO_IDS: Final[I64] = np.empty(0, dtype=np.int64)
NO_FILTERS: Final[U8] = np.empty((0, FILTER_BYTES), dtype=np.uint8)


def _no_ids() -> I64:
    return NO_IDS


@dataclass(frozen=True, slots=True)
class ViewerMemoryState:
    """The memory of one viewer at one moment. A video that was shown twice may be listed twice."""

    shown_ids: I64 = field(default_factory=_no_ids)  # [S] oldest first
    shown_at_s: F64 = field(default_factory=lambda: np.empty(0))  # [S] ascending
    watched: U8 = field(default_factory=lambda: NO_FILTERS)  # [G, FILTER_BYTES] only filters that hold a video
    watched_generations: I64 = field(default_factory=_no_ids)  # [G]
    blocked_creators: I64 = field(default_factory=_no_ids)
    blocked_topics: I64 = field(default_factory=_no_ids)
    followed_creators: I64 = field(default_factory=_no_ids)

    def with_shown(self, video_ids: I64, shown_at_s: F64) -> ViewerMemoryState:
        """Returns the state with more shown videos."""
        ids = np.concatenate([self.shown_ids, video_ids])
        times_s = np.concatenate([self.shown_at_s, shown_at_s])
        if (np.diff(times_s) < 0).any():
            order = np.argsort(times_s, kind="stable")
            ids, times_s = ids[order], times_s[order]
        return replace(self, shown_ids=ids, shown_at_s=times_s)


NO_MEMORY: Final = ViewerMemoryState()


class ShownSlate(NamedTuple):
    """The videos of one slate that a viewer was shown."""

    viewer_id: int
    video_ids: I64
    shown_at_s: float


class ViewerMemory(Protocol):
    """A store of all viewers' memories. Threads and processes may share it; every call is atomic for one viewer.

    Every method blocks and raises ``StorageError`` if the store cannot be read or written, or ``DataError`` if what it
    holds of the viewer is damaged.
    """

    def read(self, viewer_id: int) -> ViewerMemoryState:
        """Returns the memory of one viewer; empty for an unknown viewer."""
        ...

    def remember_shown(self, viewer_id: int, video_ids: Sequence[int] | I64, shown_at_s: float) -> None:
        """Adds the videos of one slate."""
        ...

    def remember_slates(self, slates: Sequence[ShownSlate]) -> None:
        """Adds many slates, in their order."""
        ...

    def restore_shown(self, viewer_id: int, video_ids: I64, shown_at_s: F64) -> None:
        """Adds what a viewer was shown before everything that the store holds of the viewer. Idempotent."""
        ...

    def remember_watched(self, viewer_ids: I64, video_ids: I64, watched_at_s: F64) -> None:
        """Adds videos that were watched to the end. Idempotent. Shapes: ``[N], [N], [N]``."""
        ...

    def block(self, viewer_id: int, *, creators: Sequence[int] = (), topics: Sequence[int] = ()) -> None:
        """Adds blocked creators and topics; beyond ``MAX_CHOICES``, forgets those reported longest ago. Idempotent."""
        ...

    def follow(self, viewer_id: int, creators: Sequence[int]) -> None:
        """Adds followed creators; beyond ``MAX_CHOICES``, forgets those reported longest ago. Idempotent."""
        ...

    def count_entries(self, viewer_id: int) -> int:
        """Returns the number of keys or rows that hold something about the viewer."""
        ...

    def forget(self, viewer_id: int) -> int:
        """Deletes everything about the viewer. Returns the number of deleted keys or rows."""
        ...

    def is_complete(self) -> bool:
        """Whether the store has held everything since ``mark_complete``; False for a new store and after a loss."""
        ...

    def mark_complete(self) -> None:
        """Sets the marker that ``is_complete`` reads."""
        ...


def open_viewer_memory(store: FeatureStore) -> ViewerMemory:
    """Opens the memory in the technology of a Feast store's online store: its Redis, or a SQLite file beside it.

    Raises:
        StorageError: if the SQLite file cannot be opened. Redis is reached by the first call.
    """
    from feast.infra.online_stores.redis import RedisOnlineStore

    online = store._get_provider().online_store
    if isinstance(online, RedisOnlineStore):
        from reelway.platform.features.viewer_memory_redis import RedisViewerMemory

        return RedisViewerMemory(online._get_client(store.config.online_store))
    from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory

    return SqliteViewerMemory(Path(store.repo_path) / MEMORY_FILE)


def pack_shown(video_ids: Sequence[int] | I64, shown_at_s: float | F64) -> bytes:
    """Returns shown videos as ``SHOWN_ENTRY`` records. Times are rounded down to seconds."""
    entries = np.empty(len(video_ids), dtype=SHOWN_ENTRY)
    entries["video_id"] = video_ids
    entries["shown_at_s"] = np.asarray(shown_at_s, dtype=np.int64)
    return entries.tobytes()


def trim_shown(packed: bytes, now_s: float) -> bytes:
    """Returns the newest ``MAX_SHOWN_VIDEOS`` entries without expired entries at the beginning."""
    entries = np.frombuffer(packed, dtype=SHOWN_ENTRY)[-MAX_SHOWN_VIDEOS:]
    live = entries["shown_at_s"] >= oldest_shown_s(now_s)
    return entries[int(live.argmax()) if live.any() else len(entries) :].tobytes()


def oldest_shown_s(now_s: float) -> int:
    """Returns the time before which shown videos are forgotten, in Unix seconds."""
    return max(int(now_s) - MAX_SHOWN_HOURS * 3600, 0)


def memory_state(
    packed: bytes,
    filters: Iterable[tuple[int, bytes]],
    creators: Iterable[int],
    topics: Iterable[int],
    followed: Iterable[int] = (),
) -> ViewerMemoryState:
    """Builds the state from stored values.

    Args:
        packed: ``SHOWN_ENTRY`` records.
        filters: generation and bits of each stored filter.
        creators: blocked creators.
        topics: blocked topics.
        followed: followed creators.

    Raises:
        DataError: if a filter is longer than a filter can be.
    """
    entries = np.frombuffer(packed, dtype=SHOWN_ENTRY, count=len(packed) // SHOWN_ENTRY.itemsize)
    generations, watched = NO_IDS, NO_FILTERS
    if stored := [(generation, bits) for generation, bits in filters if bits]:
        generations = np.array([generation for generation, _ in stored], dtype=np.int64)
        watched = np.zeros((len(stored), FILTER_BYTES), dtype=np.uint8)
        for filter_, (generation, bits) in zip(watched, stored, strict=True):
            if len(bits) > FILTER_BYTES:
                raise DataError(
                    f"viewer memory: the filter of generation {generation} has {len(bits)} bytes, expected at most "
                    f"{FILTER_BYTES}; delete it"
                )
            filter_[: len(bits)] = np.frombuffer(bits, dtype=np.uint8)
    state = ViewerMemoryState(
        watched=watched,
        watched_generations=generations,
        blocked_creators=np.array(sorted(creators), dtype=np.int64),
        blocked_topics=np.array(sorted(topics), dtype=np.int64),
        followed_creators=np.array(sorted(followed), dtype=np.int64),
    )
    if not len(entries):
        return state
    return state.with_shown(entries["video_id"].astype(np.int64), entries["shown_at_s"].astype(np.float64))
