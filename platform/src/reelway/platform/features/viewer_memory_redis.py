"""Viewer memory in Redis, read in the same round trip as the viewer's row.

Per viewer: a string of packed shown videos, a string of filter bits per generation, and two sets sorted by the time of
the report, of blocks and of followed creators. Each write of one viewer is one command or one transaction, so routers
may write at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from reelway.platform.contracts.blend import MAX_SHOWN_HOURS, MAX_SHOWN_VIDEOS, MAX_WATCHED_DAYS
from reelway.platform.errors import DataError, StorageError
from reelway.platform.features.viewer_memory import (
    F64,
    I64,
    MAX_CHOICES,
    SHOWN_ENTRY,
    ShownSlate,
    ViewerMemoryState,
    memory_state,
    oldest_shown_s,
    pack_shown,
)
from reelway.platform.features.watched_filter import (
    GENERATION_DAYS,
    live_generations,
    positions_by_filter,
)
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

_PREFIX: Final = "reelway:memory"
_MARKER: Final = f"{_PREFIX}:complete"
_WATCHED_TTL_S: Final = (MAX_WATCHED_DAYS + GENERATION_DAYS) * 86_400
_EXPIRING_GENERATIONS: Final = -(-_WATCHED_TTL_S // (GENERATION_DAYS * 86_400)) + 1
"""Generations before the live ones whose keys may not have expired yet."""
COMMANDS_PER_READ: Final = 4

# Adds entries at the end (or the beginning), then removes expired and surplus entries from the beginning.
_ADD_SHOWN: Final = f"""
local key, entries, oldest, restored = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local size
if restored then
  local all = entries .. (redis.call('GET', key) or '')
  redis.call('SET', key, all)
  size = #all
else
  size = redis.call('APPEND', key, entries)
end
local first = math.max(0, size - {MAX_SHOWN_VIDEOS * SHOWN_ENTRY.itemsize})
while first < size do
  local at = struct.unpack('<I4', redis.call('GETRANGE', key, first + 8, first + 11))
  if at >= oldest then break end
  first = first + {SHOWN_ENTRY.itemsize}
end
if first >= size then
  redis.call('DEL', key)
elseif first > 0 then
  redis.call('SET', key, redis.call('GETRANGE', key, first, -1))
end
redis.call('EXPIRE', key, {MAX_SHOWN_HOURS * 3600})
"""


class RedisViewerMemory:
    """``ViewerMemory`` in Redis.

    Args:
        client: client that returns bytes.
        clock: current time in Unix seconds.
    """

    def __init__(self, client: Any, clock: Callable[[], float] = time.time) -> None:
        self.client = client
        self._clock = clock
        self._add_shown = client.register_script(_ADD_SHOWN)

    def read(self, viewer_id: int) -> ViewerMemoryState:
        with _translated_errors(f"cannot read the memory of {viewer_pseudonym(viewer_id)}"):
            with self.client.pipeline(transaction=False) as pipe:
                generations = self.add_read(pipe, viewer_id)
                answers = pipe.execute(raise_on_error=False)
            return self.decode(generations, answers)

    def add_read(self, pipe: Any, viewer_id: int) -> range:
        """Adds the ``COMMANDS_PER_READ`` commands that read a viewer to a pipeline; ``decode`` takes their answers.

        Returns the generations that are read.
        """
        generations = live_generations(self._clock())
        pipe.get(_shown_key(viewer_id))
        pipe.mget([_watched_key(viewer_id, generation) for generation in generations])
        pipe.zrange(_blocked_key(viewer_id), 0, -1)
        pipe.zrange(_followed_key(viewer_id), 0, -1)
        return generations

    def decode(self, generations: range, answers: Sequence[Any]) -> ViewerMemoryState:
        """Returns the state from the answers to the commands of ``add_read``.

        Raises:
            DataError: if an answer is an error, such as that a key holds another type, or a value is damaged.
        """
        if errors := [answer for answer in answers if isinstance(answer, Exception)]:
            raise DataError(f"viewer memory: Redis refused to read it: {errors[0]}; delete the viewer's keys")
        packed, filters, blocked, followed = answers
        try:
            return memory_state(
                packed or b"",
                [(generation, bits or b"") for generation, bits in zip(generations, filters, strict=True)],
                [int(member[1:]) for member in blocked if member[:1] == b"c"],
                [int(member[1:]) for member in blocked if member[:1] == b"t"],
                [int(member) for member in followed],
            )
        except ValueError as error:
            raise DataError(f"viewer memory: it is damaged: {error}; delete the viewer's keys") from error

    def remember_shown(self, viewer_id: int, video_ids: Sequence[int] | I64, shown_at_s: float) -> None:
        self.remember_slates([ShownSlate(viewer_id, np.asarray(video_ids, dtype=np.int64), shown_at_s)])

    def remember_slates(self, slates: Sequence[ShownSlate]) -> None:
        self._append([(s.viewer_id, pack_shown(s.video_ids, s.shown_at_s)) for s in slates], restored=False)

    def restore_shown(self, viewer_id: int, video_ids: I64, shown_at_s: F64) -> None:
        self._append([(viewer_id, pack_shown(video_ids, shown_at_s))], restored=True)

    def remember_watched(self, viewer_ids: I64, video_ids: I64, watched_at_s: F64) -> None:
        with _translated_errors("cannot write watched videos"), self.client.pipeline(transaction=False) as pipe:
            for viewer_id, generation, positions in positions_by_filter(viewer_ids, video_ids, watched_at_s):
                key = _watched_key(viewer_id, generation)
                bits = pipe.bitfield(key)
                for position in positions.tolist():
                    bits.set("u1", position, 1)
                bits.execute()  # queues one command
                pipe.expire(key, _WATCHED_TTL_S)
            pipe.execute()

    def block(self, viewer_id: int, *, creators: Sequence[int] = (), topics: Sequence[int] = ()) -> None:
        if members := [f"c{creator}" for creator in creators] + [f"t{topic}" for topic in topics]:
            with _translated_errors(f"cannot write the blocks of {viewer_pseudonym(viewer_id)}"):
                self._add_choices(_blocked_key(viewer_id), members)

    def follow(self, viewer_id: int, creators: Sequence[int]) -> None:
        if creators:
            with _translated_errors(f"cannot write the followed creators of {viewer_pseudonym(viewer_id)}"):
                self._add_choices(_followed_key(viewer_id), [int(creator) for creator in creators])

    def count_entries(self, viewer_id: int) -> int:
        with _translated_errors(f"cannot count the memory of {viewer_pseudonym(viewer_id)}"):
            return int(self.client.exists(*self._keys(viewer_id)))

    def forget(self, viewer_id: int) -> int:
        with _translated_errors(f"cannot delete the memory of {viewer_pseudonym(viewer_id)}"):
            return int(self.client.delete(*self._keys(viewer_id)))

    def is_complete(self) -> bool:
        with _translated_errors("cannot read the marker"):
            return bool(self.client.exists(_MARKER))

    def mark_complete(self) -> None:
        with _translated_errors("cannot write the marker"):
            self.client.set(_MARKER, 1)

    def _keys(self, viewer_id: int) -> list[str]:
        """Returns all keys that may hold something about the viewer, those of expired generations too."""
        live = live_generations(self._clock())
        stored = range(live.start - _EXPIRING_GENERATIONS, live.stop + 1)
        watched = [_watched_key(viewer_id, generation) for generation in stored]
        return [_shown_key(viewer_id), _blocked_key(viewer_id), _followed_key(viewer_id), *watched]

    def _add_choices(self, key: str, members: Sequence[str | int]) -> None:
        now_s = self._clock()
        with self.client.pipeline(transaction=True) as pipe:
            pipe.zadd(key, dict.fromkeys(members, now_s))
            pipe.zremrangebyrank(key, 0, -MAX_CHOICES - 1)
            pipe.execute()

    def _append(self, packed: Sequence[tuple[int, bytes]], *, restored: bool) -> None:
        oldest_s = oldest_shown_s(self._clock())
        with _translated_errors("cannot write shown videos"), self.client.pipeline(transaction=False) as pipe:
            for viewer_id, entries in packed:
                self._add_shown([_shown_key(viewer_id)], [entries, oldest_s, int(restored)], client=pipe)
            pipe.execute()


def _shown_key(viewer_id: int) -> str:
    return f"{_PREFIX}:shown:{viewer_id}"


def _watched_key(viewer_id: int, generation: int) -> str:
    return f"{_PREFIX}:watched:{viewer_id}:{generation}"


def _blocked_key(viewer_id: int) -> str:
    return f"{_PREFIX}:blocked:{viewer_id}"


def _followed_key(viewer_id: int) -> str:
    return f"{_PREFIX}:followed:{viewer_id}"


@contextmanager
def _translated_errors(failure: str) -> Iterator[None]:
    from redis import RedisError

    try:
        yield
    except (RedisError, OSError) as error:
        raise StorageError(f"viewer memory: {failure}: {type(error).__name__}: {error}; check Redis") from error
