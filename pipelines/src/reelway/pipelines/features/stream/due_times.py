"""Computes when the next row of an entity is due.

The points are those of ``views.snapshot_points``, computed without listing all of them.
"""

# Shapes: N rows of E entities, in the entities' order

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.features.stream.time_buckets import EmissionSchedule
from reelway.pipelines.features.windows import I64

NEVER_US: Final = 1 << 62


def due_and_next(
    owner: I64, known_us: I64, entities: int, schedule: EmissionSchedule, at_us: int
) -> tuple[NDArray[np.bool_], I64, I64]:
    """Returns whether a row is due at ``at_us``, the first point after ``at_us``, and the last point up to ``at_us``.

    Args:
        owner: ``[N]``, 0..E-1.
        known_us: ``[N]``, first microseconds of buckets, or the events' own times.

    Returns:
        ``[E]`` each; ``NEVER_US`` and ``-NEVER_US`` if there is no such point.
    """
    next_us = np.full(entities, NEVER_US, dtype=np.int64)
    last_us = np.full(entities, -NEVER_US, dtype=np.int64)

    def point(when: I64, of: I64) -> None:
        after = when > at_us
        np.minimum.at(next_us, of[after], when[after])
        np.maximum.at(last_us, of[~after], when[~after])

    for length_us in (0, *schedule.windows_us):
        point(-(-(known_us + length_us) // schedule.grid_us) * schedule.grid_us, owner)
    if schedule.heartbeat_us and schedule.windows_us:
        beat_us = schedule.heartbeat_us
        day, beats, today = known_us // beat_us, max(schedule.windows_us) // beat_us, at_us // beat_us
        coming = np.maximum(today, day) + 1
        point((coming * beat_us)[coming <= day + beats], owner[coming <= day + beats])
        past = np.minimum(today, day + beats)
        point((past * beat_us)[past > day], owner[past > day])
    return last_us == at_us, next_us, last_us


def expiry_us(last_us: I64, ttl_us: int, grid_us: int) -> I64:
    """Returns the first grid point at which the point-in-time join no longer uses a row of ``last_us``."""
    expires: I64 = np.where(last_us == -NEVER_US, NEVER_US, (last_us + ttl_us) // grid_us * grid_us + grid_us)
    return expires
