"""What every task of a stream computes with: settings and TTLs of the views, their schedules, and the stream's time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from reelway.pipelines.features.stream.time_buckets import (
    ACTIVITY,
    AFFINITY,
    CREATORS,
    ENGAGEMENT,
    HISTORY,
    EmissionSchedule,
    emission_schedules,
)
from reelway.pipelines.features.views import ViewSettings

VIEWER_VIEWS: Final = (ACTIVITY, AFFINITY, HISTORY)
VIDEO_VIEWS: Final = (ENGAGEMENT, CREATORS)


@dataclass(frozen=True)
class StreamRules:
    """The rules of one stream.

    Args:
        ttl_us: TTL of each view, as registered with Feast.
        behind_us: offset of the stream's time to the log's time; 0 unless the data set ended long ago.
    """

    views: ViewSettings
    ttl_us: Mapping[str, int]
    behind_us: int = 0

    @cached_property
    def schedules(self) -> dict[str, EmissionSchedule]:
        return emission_schedules(self.views)

    @cached_property
    def fine_us(self) -> int:
        """The finest grid. All times at which the stream stands are on it."""
        return math.gcd(*(schedule.grid_us for schedule in self.schedules.values()))

    @cached_property
    def coarse_us(self) -> tuple[int, ...]:
        """Grids of the viewer views and of the deltas that a step must not cross."""
        return tuple(sorted({s.grid_us for view, s in self.schedules.items() if view != HISTORY}))

    def due_grid_us(self, view: str) -> int:
        """Grid of the times at which the stream looks for entities that are due without an event.

        A row of ``viewer_history`` becomes due without an event only when it expires. The coarser grid delays the
        row of nulls, which no request sees: Feast's TTL applies to the row before it.
        """
        return self.schedules[ACTIVITY if view == HISTORY else view].grid_us
