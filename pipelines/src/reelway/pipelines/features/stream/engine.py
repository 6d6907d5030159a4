"""One step of the stream: applies outcomes up to a given time and returns the rows that are due at that time.

The engine does not access the log, the clock or the stores. A step ends at a grid point and never crosses a point of a
coarser grid. So each row is computed from exactly the outcomes known at its time.
"""

# Shapes: N outcomes, E entities

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.due_times import NEVER_US, due_and_next, expiry_us
from reelway.pipelines.features.stream.open_impressions import (
    HORIZON_US,
    Outcomes,
    label_open_impressions,
    merge_outcomes,
    within_horizon,
)
from reelway.pipelines.features.stream.state import Entities, StreamState
from reelway.pipelines.features.stream.time_buckets import (
    CREATORS,
    ENTITY_KEYS,
    HISTORY,
    LAYOUTS,
    STREAMED,
    EmissionSchedule,
    emission_schedules,
    prune_rows,
    sum_rows,
    to_bucket_rows,
    to_events,
    view_values_at,
)
from reelway.pipelines.features.views import AFTER_US, Events, ViewSettings
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import TIMESTAMP_TYPE

APPLIED: Final = "applied"
REPEATED: Final = "repeated"
TOO_LATE: Final = "too_late"
UNKNOWN_VIDEO: Final = "unknown_video"
ENTITY_CHUNK: Final = 20_000
"""Maximum number of entities whose rows are in memory at once."""
APPLY_RESULTS: Final = (APPLIED, REPEATED, TOO_LATE, UNKNOWN_VIDEO)
"""Results of applying an outcome.

Repeated: the impression already has an outcome of this type. Too late: the outcome is later than the horizon.
"""


@dataclass(frozen=True)
class StreamCatalogue:
    """The data set's videos and creators, read once at start."""

    videos: pa.Table  # ascending video_id; columns video_id, creator_id, topic, duration_ms, uploaded_at
    creators: pa.Table

    @classmethod
    def of(cls, videos: pa.Table, creators: pa.Table) -> StreamCatalogue:
        columns = ["video_id", "creator_id", "topic", "duration_ms", "uploaded_at"]
        return cls(videos.select(columns).sort_by("video_id").combine_chunks(), creators)

    def rows_of(self, video_ids: I64) -> I64:
        """Returns the rows of the videos, -1 for an unknown video."""
        ids = self.videos["video_id"].to_numpy()
        if not len(ids):
            return np.full(len(video_ids), -1, dtype=np.int64)
        row = np.minimum(np.searchsorted(ids, video_ids), len(ids) - 1)
        return np.where(ids[row] == video_ids, row, -1)


@dataclass(frozen=True)
class EmittedRows:
    """Rows of one view: entity, ``event_timestamp``, ``created_timestamp`` and the fields; nulls for expired rows."""

    view: str
    rows: pa.Table


class StreamEngine:
    """Applies outcomes to the state and computes rows from the state.

    Args:
        ttl_us: TTL of each view, as registered with Feast.
        clock_offset_us: offset of the stream's time to the clock; 0 unless the data set ended long ago.
    """

    def __init__(
        self,
        state: StreamState,
        catalogue: StreamCatalogue,
        settings: ViewSettings,
        ttl_us: Mapping[str, int],
        clock_offset_us: int = 0,
    ) -> None:
        self.state = state
        self.catalogue = catalogue
        self.settings = settings
        self.ttl_us = ttl_us
        self.behind_us = clock_offset_us
        self.schedules = emission_schedules(settings)
        self.fine_us = math.gcd(*(schedule.grid_us for schedule in self.schedules.values()))
        self.coarse_us = sorted({self.schedules[view].grid_us for view in STREAMED if view != HISTORY})
        self.result_counts = dict.fromkeys(APPLY_RESULTS, 0)

    def steps(self, after_us: int, until_us: int, times_us: I64) -> Iterator[int]:
        """Returns the times in ``(after_us, until_us]`` at which a row may be due, and ``until_us``.

        Args:
            times_us: times of the waiting outcomes; each counts from ``AFTER_US`` later.
        """
        grid = self.schedules[HISTORY].grid_us
        ends = set((-(-(times_us + AFTER_US) // grid) * grid).tolist())
        for coarse in self.coarse_us:
            ends.update(range((after_us // coarse + 1) * coarse, until_us + 1, coarse))
        last = until_us // self.fine_us * self.fine_us
        ends.add(last)
        yield from sorted(end for end in ends if after_us < end <= last)

    def step(self, until_us: int, outcomes: Outcomes) -> list[EmittedRows]:
        """Applies the outcomes that count from ``(the last step, until_us]`` and returns the rows due at ``until_us``.

        Must be called within a transaction of the state.
        """
        touched = self._apply(outcomes) if len(outcomes) else {}
        emitted = []
        for view in STREAMED:
            schedule = self.schedules[view]
            if until_us % schedule.grid_us == 0:
                emitted += self._emit(view, schedule, until_us)
        if touched:
            self.state.close_impressions(until_us + self.behind_us - HORIZON_US)
        return emitted

    def _apply(self, outcomes: Outcomes) -> dict[str, I64]:
        known = self.catalogue.rows_of(outcomes.video_id) >= 0
        timely = within_horizon(outcomes, self.behind_us)
        self.result_counts[UNKNOWN_VIDEO] += int((~known).sum())
        self.result_counts[TOO_LATE] += int((known & ~timely).sum())
        outcomes = outcomes.take(known & timely)
        before = self.state.impressions(np.unique(outcomes.impression_id))
        old, new, repeats = merge_outcomes(before, outcomes, self.behind_us)
        self.result_counts[REPEATED] += repeats
        self.result_counts[APPLIED] += len(outcomes) - repeats
        if not len(new):
            return {}
        self.state.save_impressions(new)
        rows = np.unique(self.catalogue.rows_of(np.concatenate([old.video_id, new.video_id])))
        videos = self.catalogue.videos.take(pa.array(rows))
        removed, added = (
            label_open_impressions(old, videos, self.behind_us),
            label_open_impressions(new, videos, self.behind_us),
        )
        return {view: self._add(view, removed, added) for view in STREAMED}

    def _add(self, view: str, removed: Events, added: Events) -> I64:
        schedule = self.schedules[view]
        minus_entity, minus = to_bucket_rows(view, removed, schedule.bucket_us)
        plus_entity, plus = to_bucket_rows(view, added, schedule.bucket_us)
        keys = LAYOUTS[view].keys
        minus = minus.copy()
        minus[:, keys:] *= -1
        entity = np.concatenate([minus_entity, plus_entity])
        ids, owner = np.unique(entity, return_inverse=True)
        if not len(ids):
            return ids
        entities = self.state.entities(view, ids)
        owner, rows = sum_rows(
            view, np.concatenate([entities.owner, owner]), np.concatenate([entities.rows, minus, plus])
        )
        due = np.full(len(ids), NEVER_US, dtype=np.int64)
        plus_owner = np.searchsorted(ids, plus_entity)
        np.minimum.at(due, plus_owner, -(-plus[:, 0] // schedule.grid_us) * schedule.grid_us)
        self.state.save(view, Entities(ids, owner, rows, entities.last_us, np.minimum(entities.due_us, due)))
        return ids

    def _emit(self, view: str, schedule: EmissionSchedule, at_us: int) -> list[EmittedRows]:
        ids = self.state.due(view, at_us)
        return [
            rows
            for start in range(0, len(ids), ENTITY_CHUNK)
            for rows in self._emit_some(view, schedule, at_us, ids[start : start + ENTITY_CHUNK])
        ]

    def _emit_some(self, view: str, schedule: EmissionSchedule, at_us: int, ids: I64) -> list[EmittedRows]:
        entities = self.state.entities(view, ids)
        now, next_us, _ = self.due_times(view, schedule, entities, at_us)
        events = to_events(view, entities.of(entities.owner), entities.rows)
        emitted = []
        if now.any():
            points = (ids[now], np.full(int(now.sum()), at_us, dtype=np.int64))
            emitted.append(
                EmittedRows(view, view_values_at(view, events, self.settings, points, self.creators_of(view, ids)))
            )
        last_us = np.where(now, at_us, entities.last_us)
        expires = expiry_us(last_us, self.ttl_us[view], schedule.grid_us)
        over = ~now & (expires <= at_us)
        if over.any():
            emitted.append(EmittedRows(view, self.expired_rows(view, ids[over], at_us)))
        open_from = at_us + self.behind_us - HORIZON_US
        owner, rows = prune_rows(view, schedule, entities.owner, entities.rows, at_us, open_from)
        deletable = over & (next_us == NEVER_US) & ~np.isin(np.arange(len(ids)), owner)
        self.state.delete_entities(view, ids[deletable])
        last_us = np.where(over, -NEVER_US, last_us)
        expires = np.where(over, NEVER_US, expires)
        stay = np.flatnonzero(~deletable)
        row_stays = ~deletable[owner]
        self.state.save(
            view,
            Entities(
                ids[stay],
                np.searchsorted(stay, owner[row_stays]),
                rows[row_stays],
                last_us[stay],
                np.minimum(next_us, expires)[stay],
            ),
        )
        return emitted

    def due_times(
        self, view: str, schedule: EmissionSchedule, entities: Entities, at_us: int
    ) -> tuple[NDArray[np.bool_], I64, I64]:
        """Returns which entities have a row due now, and the times of each entity's next and previous row."""
        now, next_us, last_us = due_and_next(entities.owner, entities.rows[:, 0], len(entities.ids), schedule, at_us)
        if view == CREATORS:
            uploads = self.creators_of(view, entities.ids)[1]
            owner = np.searchsorted(entities.ids, uploads["creator_id"].to_numpy())
            upload = EmissionSchedule(schedule.grid_us)
            also, later, before = due_and_next(
                owner, times_us(uploads["uploaded_at"]), len(entities.ids), upload, at_us
            )
            creators = self.creators_of(view, entities.ids)[0]
            creator_index = np.searchsorted(entities.ids, creators["creator_id"].to_numpy())
            _, _, first = due_and_next(
                creator_index, times_us(creators["created_at"]), len(entities.ids), EmissionSchedule(1), at_us
            )
            now, next_us = now | also, np.minimum(next_us, later)
            last_us = np.maximum(last_us, np.maximum(before, first))
        return now, next_us, last_us

    def creators_of(self, view: str, ids: I64) -> tuple[pa.Table, pa.Table]:
        """Returns the given creators and their uploads; empty tables for the other views."""
        creators, videos = self.catalogue.creators, self.catalogue.videos
        if view != CREATORS:
            return creators.slice(0, 0), videos.slice(0, 0)
        return (
            creators.filter(pa.array(np.isin(creators["creator_id"].to_numpy(), ids))),
            videos.filter(pa.array(np.isin(videos["creator_id"].to_numpy(), ids))),
        )

    def expired_rows(self, view: str, ids: I64, at_us: int) -> pa.Table:
        """Returns rows of nulls for entities whose rows have expired."""
        empty = view_values_at(
            view, to_events(view, ids[:0], np.zeros((0, len(LAYOUTS[view].columns)), np.int64)), self.settings,
            (ids[:0], ids[:0]), self.creators_of(view, ids[:0]),
        )  # fmt: skip
        when = pa.array(np.full(len(ids), at_us), pa.int64()).cast(TIMESTAMP_TYPE)
        fixed = {ENTITY_KEYS[view]: pa.array(ids), "event_timestamp": when, "created_timestamp": when}
        return pa.table([fixed.get(f.name, pa.nulls(len(ids), f.type)) for f in empty.schema], schema=empty.schema)
