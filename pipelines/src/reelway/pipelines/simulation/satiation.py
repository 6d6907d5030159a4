"""Satiation: a viewer enjoys a video less after earlier exposures to it, and recovers with time.

Similar videos have a milder effect: earlier exposures to the same topic or creator count within a session. All three
are sums of exposures that decay exponentially; ``world_constants`` has weights, half-lives and sources.
"""

# Shapes: B requests, S slate, M videos, N keys, L levels (video, topic, creator)

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.simulation import world_constants as constants
from reelway.pipelines.simulation.population import Videos
from reelway.pipelines.simulation.responses import ENJOYED_RATIO
from reelway.platform.contracts.events import OutcomeType

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

_FREE: Final = -1
_HASH: Final = np.uint64(0x9E3779B97F4A7C15)
_FAINT: Final = 0.01
"""Smaller sums are forgotten: their effect is below 0.04 logits."""


class DecayingSums:
    """Sums that decay with a half-life, one per non-negative integer key: a hash table in arrays.

    Callers first resolve keys to slots, then read and add by slot. Slots are valid until the next ``slots`` call.
    """

    def __init__(self, half_life_s: float, capacity_bits: int = 12) -> None:
        self._half_life_s = half_life_s
        self._allocate(capacity_bits)

    def slots(self, keys: I64) -> I64:
        """Returns the slot of each key, in the shape of ``keys``; new keys get a slot with the sum 0."""
        flat = keys.ravel()
        if 2 * (self._used + len(flat)) > len(self._keys):
            self._make_room(len(flat))
        self._used += len(flat)
        slot = self._insert(flat)
        return slot.reshape(keys.shape)

    def read(self, slots: I64, time_s: F64) -> F32:
        """Returns the sums at ``time_s``, which broadcasts to the shape of ``slots``."""
        age_s = np.maximum(time_s - self._time_s[slots], 0.0)
        found: F32 = self._sum[slots] * np.exp2(age_s / -self._half_life_s).astype(np.float32)
        return found

    def add(self, slots: I64, time_s: F64, amount: F32) -> None:
        """Adds amounts at times, ``[N]`` each, in any order; slots may repeat."""
        before_s = self._time_s[slots]
        np.maximum.at(self._time_s, slots, time_s)
        now_s = self._time_s[slots]
        self._sum[slots] *= np.exp2((before_s - now_s) / self._half_life_s).astype(np.float32)
        np.add.at(self._sum, slots, amount * np.exp2((time_s - now_s) / self._half_life_s).astype(np.float32))

    def __len__(self) -> int:
        """Number of keys that have a slot."""
        return int((self._keys != _FREE).sum())

    def _allocate(self, bits: int) -> None:
        self._shift = np.uint64(64 - bits)
        self._keys = np.full(1 << bits, _FREE, dtype=np.int64)
        self._sum = np.zeros(1 << bits, dtype=np.float32)
        self._time_s = np.zeros(1 << bits)
        self._used = 0
        """Upper bound of the number of keys."""

    def _insert(self, keys: I64) -> I64:
        """Returns slots by linear probing, of all keys at once."""
        slot = ((keys.astype(np.uint64) * _HASH) >> self._shift).astype(np.int64)
        pending = np.arange(len(keys))
        while len(pending):
            at, key = slot[pending], keys[pending]
            free = self._keys[at] == _FREE
            self._keys[at[free]] = key[free]  # of several keys for one slot, the last gets it
            pending = pending[self._keys[at] != key]
            slot[pending] = (slot[pending] + 1) % len(self._keys)
        return slot

    def _make_room(self, more: int) -> None:
        """Forgets faint sums, and doubles the table until it is at most a quarter full with ``more`` further keys."""
        latest_s = self._time_s.max()
        taken = np.flatnonzero(self._keys != _FREE)
        kept = taken[self.read(taken, latest_s) > _FAINT]
        keys, sums, time_s = self._keys[kept], self._sum[kept], self._time_s[kept]
        bits = len(self._keys).bit_length() - 1
        while 4 * (len(keys) + more) > 1 << bits:
            bits += 1
        self._allocate(bits)
        slot = self._insert(keys)
        self._sum[slot], self._time_s[slot] = sums, time_s
        self._used = len(keys)


@dataclass(frozen=True)
class _Level:
    entity: I64  # [M]
    """Row of the video, topic or creator of each video."""
    count: int
    weight: float
    sums: DecayingSums


class ViewingHistory:
    """Exposures of viewers to videos, topics and creators: the only state that responses change.

    Each log, live traffic and arm of a closed loop has its own.
    """

    def __init__(self, videos: Videos) -> None:
        self._duration_ms = videos.duration_ms
        self._levels = tuple(
            _Level(entity_M.astype(np.int64), int(entity_M.max()) + 1, weight, DecayingSums(half_life_s))
            for entity_M, weight, half_life_s in (
                (np.arange(len(videos.topic)), constants.VIDEO_SATIATION, constants.VIDEO_RECOVERY_S),
                (videos.topic, constants.TOPIC_SATIATION, constants.SESSION_RECOVERY_S),
                (videos.creator, constants.CREATOR_SATIATION, constants.SESSION_RECOVERY_S),
            )
        )

    def slots(self, viewer_ids: I64, video: I64) -> I64:
        """Returns the slots of viewers ``[B]`` and video rows ``[B, S]``, ``[L, B, S]``, valid until the next call."""
        return np.stack(
            [level.sums.slots(viewer_ids[:, None] * level.count + level.entity[video]) for level in self._levels]
        )

    def penalty(self, slots_LBS: I64, time_s: F64) -> F32:
        """Returns how much satiation lowers the logit of enjoyment at times ``[B]``, ``[B, S]``."""
        total_BS = np.zeros(slots_LBS.shape[1:], dtype=np.float32)
        for level, slots_BS in zip(self._levels, slots_LBS, strict=True):
            total_BS += np.float32(level.weight) * np.log1p(level.sums.read(slots_BS, time_s[:, None]))
        return total_BS

    def add(self, slots_LBS: I64, time_s: F64, *, examined: Bools, enjoyed: Bools) -> None:
        """Adds the exposures of examined positions, ``[B, S]``, at times ``[B]``."""
        row, place = np.nonzero(examined)
        amount = _exposure(enjoyed[row, place])
        for level, slots_BS in zip(self._levels, slots_LBS, strict=True):
            level.sums.add(slots_BS[row, place], time_s[row], amount)

    def add_outcomes(self, outcomes: pa.Table) -> None:
        """Adds the exposures of a log's watch outcomes, at the end of each watch."""
        watch = outcomes.filter(pc.equal(outcomes["type"].cast(pa.string()), OutcomeType.WATCH.value))
        video = watch["video_id"].to_numpy() - 1
        amount = _exposure(watch["value"].to_numpy() >= ENJOYED_RATIO * self._duration_ms[video])
        time_s = watch["event_time"].cast(pa.int64()).to_numpy() / 1e6
        for level, slots in zip(
            self._levels, self.slots(watch["viewer_id"].to_numpy(), video[:, None])[:, :, 0], strict=True
        ):
            level.sums.add(slots, time_s, amount)


def _exposure(enjoyed: Bools) -> F32:
    return np.where(enjoyed, np.float32(constants.WATCHED_EXPOSURE), np.float32(constants.SKIPPED_EXPOSURE))
