"""Recomputes rows of the views for pairs of an entity and a time, by the batch job's functions.

Every pair gets the events that the batch job would know at the pair's time, as events of an entity of its own. Then one
call of a view's functions computes the rows of many pairs. For views on a coarse grid, the events of an entity in one
grid step are summed first, so that a busy video costs no more than its longest window has steps.
"""

# Shapes: V versions, Q pairs of entity and time, N events of all pairs

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features import views
from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.parity.impression_versions import NEVER_US, Versions
from reelway.pipelines.features.parity.run_files import RunTables
from reelway.pipelines.features.point_in_time import distinct_entity_rows
from reelway.pipelines.features.views import SECOND_US, Events, SnapshotPoints, ViewSettings
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts import feature_names as names

MAX_EVENTS: Final = 250_000
"""Events of the pairs whose rows are computed at once. A single pair may have more."""
MAX_PARTS: Final = 16
"""Collected pieces of a view that are summed into one."""
NO_ROW_US: Final = -NEVER_US
_SUMS: Final = ("count", "long_watch", "like", "skip", "follow", "watch_ms", "weight_milli", "taste_milli")
_FACTS: Final = ("impression_id", "video_id", "event_us")  # of single events, for the history


@dataclass(frozen=True)
class ViewRule:
    """How rows of a view come from events: its key, grid and functions."""

    view: str
    key: str  # field of Events
    grid_us: int
    step_us: int
    """Events in one step are interchangeable; 0 if every event matters."""
    memory_us: int
    """Events that are older than this affect no valid row; 0 if all events do."""
    by_topic: bool
    points: Callable[[Events, ViewSettings, int], SnapshotPoints]
    at: Callable[[Events, ViewSettings, SnapshotPoints], pa.Table]


def view_rules(settings: ViewSettings, ttl_us: dict[str, int]) -> dict[str, ViewRule]:
    """Returns the rules of the views of viewers and videos that depend on events."""
    beat = settings.heartbeat_s * SECOND_US
    viewer = [window.length_s * SECOND_US for window in names.VIEWER_WINDOWS]
    video = [window.length_s * SECOND_US for window in names.VIDEO_WINDOWS]

    def rule(view: str, key: str, grid_s: int, windows: list[int], points: object, at: object) -> ViewRule:
        grid = grid_s * SECOND_US
        memory = max(windows) + ttl_us[view] + 2 * grid if windows else 0
        step = math.gcd(grid, *windows, beat) if windows else 0
        return ViewRule(view, key, grid, step, memory, view == AFFINITY, points, at)  # type: ignore[arg-type]

    rules = [
        rule(ACTIVITY, "viewer_id", settings.activity_grid_s, viewer, views.viewer_activity_points,
             views.viewer_activity_at),
        rule(AFFINITY, "viewer_id", settings.affinity_grid_s, viewer[-1:], views.viewer_topic_affinity_points,
             views.viewer_topic_affinity_at),
        rule(HISTORY, "viewer_id", settings.history_grid_s, [], views.viewer_history_points, views.viewer_history_at),
        rule(ENGAGEMENT, "video_id", settings.engagement_grid_s, video, views.video_engagement_points,
             views.video_engagement_at),
    ]  # fmt: skip
    return {one.view: one for one in rules}


def creator_rule(settings: ViewSettings, videos: pa.Table, creators: pa.Table) -> ViewRule:
    """Returns the rule of the creators' view for these uploads and creators."""
    grid = settings.creator_grid_s * SECOND_US
    step = math.gcd(grid, names.CREATOR_WINDOW.length_s * SECOND_US)

    def points(events: Events, settings: ViewSettings, until_us: int) -> SnapshotPoints:
        return views.creator_statistics_points(events, videos, settings, until_us)

    def at(events: Events, settings: ViewSettings, at: SnapshotPoints) -> pa.Table:
        return views.creator_statistics_at(events, videos, creators, settings, at)

    return ViewRule(CREATORS, "creator_id", grid, step, 0, False, points, at)


ACTIVITY: Final = "viewer_activity"
HISTORY: Final = "viewer_history"
AFFINITY: Final = "viewer_topic_affinity"
ENGAGEMENT: Final = "video_engagement"
CREATORS: Final = "creator_statistics"


@dataclass(frozen=True)
class ViewEvents:
    """The events of some entities for one view, sorted by entity. ``[V]``"""

    entity: I64
    known_us: I64
    end_us: I64
    columns: dict[str, I64]


def collect_events(wanted: Iterable[tuple[ViewRule, I64]], versions: Iterable[Versions]) -> dict[str, ViewEvents]:
    """Returns the events of the wanted entities (ascending ids) for each view, in one pass over the versions."""
    wanted = list(wanted)
    parts: dict[str, list[ViewEvents]] = {rule.view: [_of_entities(rule, _ZERO, _NO_VERSIONS)] for rule, _ in wanted}
    for some in versions:
        for rule, entities in wanted:
            parts[rule.view].append(_of_entities(rule, entities, some))
            if len(parts[rule.view]) > MAX_PARTS:
                parts[rule.view] = [_joined(rule, parts[rule.view])]
    return {rule.view: _joined(rule, parts[rule.view]) for rule, _ in wanted}


def _of_entities(rule: ViewRule, entities: I64, versions: Versions) -> ViewEvents:
    events = versions.events
    keep = np.isin(getattr(events, rule.key), entities)
    if rule.by_topic:
        keep[np.setdiff1d(np.arange(len(keep)), views.topic_rows(events))] = False
    rows = np.flatnonzero(keep)
    fields = _FACTS if rule.step_us == 0 else ()
    columns = {name: getattr(events, name)[rows] for name in (*fields, *_SUMS)}
    if rule.by_topic:
        columns["topic"] = events.topic[rows]
    found = ViewEvents(getattr(events, rule.key)[rows], events.known_us[rows], versions.end_us[rows], columns)
    return _summed(rule, found)


def _joined(rule: ViewRule, parts: list[ViewEvents]) -> ViewEvents:
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    entity, known, end = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("entity", "known_us", "end_us")
    )
    return _summed(rule, ViewEvents(entity, known, end, columns))


def _summed(rule: ViewRule, events: ViewEvents) -> ViewEvents:
    """Sorts by entity and time. If the view allows it, sums the events of a step, named by its first microsecond."""
    known, end = events.known_us, events.end_us
    if rule.step_us:
        known = (known - 1) // rule.step_us * rule.step_us + 1
        end = np.where(end == NEVER_US, end, (end - 1) // rule.step_us * rule.step_us + 1)
    keep = np.flatnonzero(known < end)
    entity, known, end = events.entity[keep], known[keep], end[keep]
    columns = {name: values[keep] for name, values in events.columns.items()}
    topic = columns.get("topic", np.zeros(len(entity), np.int64))
    order = np.lexsort((topic, end, known, entity))
    entity, known, end, topic = entity[order], known[order], end[order], topic[order]
    columns = {name: values[order] for name, values in columns.items()}
    if rule.step_us and len(entity):
        first = np.ones(len(entity), dtype=np.bool_)
        first[1:] = np.logical_or.reduce([values[1:] != values[:-1] for values in (entity, known, end, topic)])
        starts = np.flatnonzero(first)
        columns = {
            name: values[starts] if name == "topic" else np.add.reduceat(values, starts)
            for name, values in columns.items()
        }
        entity, known, end = entity[starts], known[starts], end[starts]
    return ViewEvents(entity, known, end, columns)


@dataclass(frozen=True)
class RecomputedRows:
    """The row of each pair: its fields, null without a valid row, and its time (``NO_ROW_US`` without one). ``[Q]``"""

    values: pa.Table
    row_us: I64


def recompute_rows(
    rule: ViewRule, events: ViewEvents, settings: ViewSettings, tables: RunTables, entities: I64, at_us: I64
) -> RecomputedRows:
    """Returns the rows that the point-in-time join over the batch job's rows would find, at ``at_us``.

    A row that is older than the view's TTL is not valid.
    """
    found_us, values, pair_of = _rows(rule, events, settings, tables, entities, at_us)
    row_us = found_us[pair_of]
    valid = (row_us != NO_ROW_US) & (at_us - row_us <= tables.ttl_us[rule.view])
    place = np.cumsum(found_us != NO_ROW_US) - 1
    taken = values.take(pa.array(place[pair_of], mask=~valid))
    return RecomputedRows(taken.select(names.VIEWS[rule.view]), np.where(valid, row_us, NO_ROW_US))


def last_row_us(rule: ViewRule, events: ViewEvents, settings: ViewSettings, entities: I64, at_us: I64) -> I64:
    """Returns the time of the newest row up to each time, by events alone; ``NO_ROW_US`` without one. ``[Q]``"""
    ids, moments, pair_of = distinct_entity_rows(entities, at_us // rule.grid_us * rule.grid_us)
    found = np.full(len(ids), NO_ROW_US, dtype=np.int64)
    for cut in _cuts(events, ids):
        known = _known_events(rule, events, ids[cut], moments[cut])
        found[cut] = _last_points(rule.points(known, settings, int(moments[cut].max())), moments[cut])
    return found[pair_of]


def _rows(
    rule: ViewRule, events: ViewEvents, settings: ViewSettings, tables: RunTables, entities: I64, at_us: I64
) -> tuple[I64, pa.Table, NDArray[np.int64]]:
    grid_us = at_us // rule.grid_us * rule.grid_us
    created_us = _created_us(tables, entities) if rule.view == CREATORS else np.full(len(entities), NEVER_US)
    # A creator's first row has the time of the account, which is on no grid.
    ids, moments, pair_of = distinct_entity_rows(
        entities, np.where((created_us > grid_us) & (created_us <= at_us), created_us, grid_us)
    )
    row_us = np.full(len(ids), NO_ROW_US, dtype=np.int64)
    parts = []
    for cut in _cuts(events, ids):
        known = _known_events(rule, events, ids[cut], moments[cut])
        own = _creator_rule(settings, tables, ids[cut]) if rule.view == CREATORS else rule
        last = _last_points(own.points(known, settings, int(moments[cut].max())), moments[cut])
        if rule.view == CREATORS:
            created = _created_us(tables, ids[cut])
            last = np.maximum(last, np.where(created <= moments[cut], created, NO_ROW_US))
        row_us[cut] = last
        due = np.flatnonzero(last != NO_ROW_US)
        parts.append(own.at(known, settings, (due, last[due])))
    if not parts:
        nothing = np.zeros(0, np.int64)
        empty = _known_events(rule, events, nothing, nothing)
        own = _creator_rule(settings, tables, nothing) if rule.view == CREATORS else rule
        parts.append(own.at(empty, settings, (nothing, nothing)))
    return row_us, pa.concat_tables(parts).combine_chunks(), pair_of


def _last_points(points: SnapshotPoints, until_us: I64) -> I64:
    pair, at_us = points
    last = np.full(len(until_us), NO_ROW_US, dtype=np.int64)
    timely = at_us <= until_us[pair]
    np.maximum.at(last, pair[timely], at_us[timely])
    return last


def _cuts(events: ViewEvents, ids: I64) -> Iterator[slice]:
    """Cuts the pairs into pieces of at most ``MAX_EVENTS`` events."""
    low, high = _ranges(events, ids)
    total, start = np.cumsum(np.maximum(high - low, 1)), 0
    while start < len(ids):
        before = total[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(total, before + MAX_EVENTS, side="right")))
        yield slice(start, end)
        start = end


def _ranges(events: ViewEvents, ids: I64) -> tuple[I64, I64]:
    """Returns the range of each entity's events."""
    low, high = (np.searchsorted(events.entity, ids, side=side) for side in ("left", "right"))
    return np.asarray(low, dtype=np.int64), np.asarray(high, dtype=np.int64)


def _known_events(rule: ViewRule, events: ViewEvents, ids: I64, moments: I64) -> Events:
    """Returns the events that each pair's batch job would know, with the pair's number as the entity."""
    low, high = _ranges(events, ids)
    count = high - low
    owner = np.repeat(np.arange(len(ids)), count)
    starts = np.cumsum(count) - count
    rows = low[owner] + np.arange(len(owner)) - starts[owner]
    moment = moments[owner]
    use = (events.known_us[rows] <= moment) & (events.end_us[rows] > moment)
    if rule.memory_us:
        use &= events.known_us[rows] > moment - rule.memory_us
    owner, rows = owner[use], rows[use]
    zero = np.zeros(len(rows), dtype=np.int64)
    columns = {name: values[rows] for name, values in events.columns.items()}
    known = {"known_us": events.known_us[rows], rule.key: owner}
    return Events(**dict.fromkeys(Events.__dataclass_fields__, zero) | columns | known)


def _created_us(tables: RunTables, creators: I64) -> I64:
    """Returns when each creator's account was created, ``NEVER_US`` for an unknown creator."""
    ids, created = tables.creators["creator_id"].to_numpy(), times_us(tables.creators["created_at"])
    if not len(ids):
        return np.full(len(creators), NEVER_US, dtype=np.int64)
    order = np.argsort(ids)
    row = order[np.minimum(np.searchsorted(ids[order], creators), len(ids) - 1)]
    return np.where(ids[row] == creators, created[row], NEVER_US)


def _creator_rule(settings: ViewSettings, tables: RunTables, ids: I64) -> ViewRule:
    """Returns the rule for pairs, with each pair's uploads and creator under the pair's number."""
    videos, creators = tables.videos, tables.creators
    return creator_rule(
        settings,
        _per_pair(videos.select(["creator_id", "uploaded_at"]), ids),
        _per_pair(creators.select(["creator_id", "followers", "created_at"]), ids),
    )


def _per_pair(table: pa.Table, ids: I64) -> pa.Table:
    key = table["creator_id"].to_numpy()
    order = np.argsort(key, kind="stable")
    low, high = (np.searchsorted(key[order], ids, side=side) for side in ("left", "right"))
    count = high - low
    owner = np.repeat(np.arange(len(ids)), count)
    rows = order[low[owner] + np.arange(len(owner)) - (np.cumsum(count) - count)[owner]]
    return table.take(pa.array(rows)).set_column(0, "creator_id", pa.array(owner, pa.int64()))


_ZERO: Final = np.zeros(0, dtype=np.int64)
_NO_VERSIONS: Final = Versions(Events(**dict.fromkeys(Events.__dataclass_fields__, _ZERO)), _ZERO)
