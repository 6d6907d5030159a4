"""Versions of the log's impressions: the labels of each impression between two of its outcomes.

The batch job at a time t labels an impression with the outcomes that were known by t. So an impression with outcomes at
three times has three versions, and at any time at most one of them counts.
"""

# Shapes: N events, V versions

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pyarrow as pa

from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.parity.event_copy import EXPOSED
from reelway.pipelines.features.parity.run_files import RunTables
from reelway.pipelines.features.stream.clock import StreamClock
from reelway.pipelines.features.views import AFTER_US, SECOND_US, Events
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import IMPRESSIONS, OUTCOME_HORIZON_S, OUTCOMES, TIMESTAMP_TYPE
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES

NEVER_US: Final = 1 << 62
HORIZON_US: Final = OUTCOME_HORIZON_S * SECOND_US


@dataclass(frozen=True)
class Versions:
    """Labelled impressions that count at times ``events.known_us <= t < end_us``. ``[V]``"""

    events: Events
    end_us: I64


def effective_time_us(rows: pa.Table, clock: StreamClock) -> I64:
    """Returns the time at which each event counts: its append to the log, in the stream's time. ``[N]``"""
    return np.asarray(np.maximum(rows["append_us"].to_numpy() - clock.behind_us, clock.began_us), dtype=np.int64)


def dataset_versions(labels: pa.Table) -> Versions:
    """Returns the impressions of the data set, whose labels do not change."""
    return Versions(Events.from_labels(labels), np.full(labels.num_rows, NEVER_US, dtype=np.int64))


def log_versions(rows: pa.Table, tables: RunTables, clock: StreamClock) -> Versions:
    """Returns the versions of the log's impressions.

    An exposure makes an impression without outcomes, from the exposure's time on, unless an outcome came before. Events
    after the horizon do not count, and of several outcomes of one type the first counts.

    Args:
        rows: events of ``event_copy.COPY_SCHEMA`` in the log's order, all of each impression.
    """
    rows = _with_video_facts(rows, tables)
    time_us = effective_time_us(rows, clock)
    timely = np.flatnonzero(time_us <= rows["shown_us"].to_numpy() - clock.behind_us + HORIZON_US)
    impression, kind = rows["impression_id"].to_numpy(), rows["kind"].to_numpy().astype(np.int64)
    use = timely[_counted(impression[timely], time_us[timely], kind[timely])]
    grid_us = tables.settings.history_grid_s * SECOND_US
    return _versions(rows.take(pa.array(use)), time_us[use], clock.behind_us, grid_us)


def _counted(impression: I64, time_us: I64, kind: I64) -> I64:
    """Returns the first event of each type per impression, by impression and time; an exposure only if it is first."""
    order = np.lexsort((np.arange(len(impression)), time_us))
    _, first = np.unique(impression[order] * (len(OUTCOME_TYPES) + 1) + kind[order] + 1, return_index=True)
    rows = np.sort(first)
    rows = order[rows]
    rows = rows[np.lexsort((np.arange(len(rows)), impression[rows]))]
    starts = np.ones(len(rows), dtype=np.bool_)
    starts[1:] = impression[rows][1:] != impression[rows][:-1]
    return np.asarray(rows[starts | (kind[rows] != EXPOSED)], dtype=np.int64)


def _with_video_facts(rows: pa.Table, tables: RunTables) -> pa.Table:
    """Takes creator, topic and duration from the data set if a record does not state them; drops unknown videos."""
    video = tables.video_rows(rows["video_id"].to_numpy())
    states_creator, states_duration = (
        rows[name].combine_chunks().is_valid().to_numpy(zero_copy_only=False) for name in ("creator_id", "duration_ms")
    )
    stated = states_creator & states_duration
    at = np.maximum(video, 0)
    for name in ("creator_id", "topic", "duration_ms"):
        own = rows[name].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
        registered = tables.videos[name].to_numpy()[at] if tables.videos.num_rows else own
        values = pa.array(np.where(stated, own, registered)).cast(rows.schema.field(name).type)
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
    return rows.filter(pa.array(stated | (video >= 0)))


def _versions(rows: pa.Table, time_us: I64, behind_us: int, grid_us: int) -> Versions:
    """Returns the versions of events that are sorted by impression and time.

    An impression has the properties that its first event stated. Of events in one step of the grid, that is the
    exposure.
    """
    impression = rows["impression_id"].to_numpy()
    new = np.ones(len(impression), dtype=np.bool_)  # first event of a version
    new[1:] = (impression[1:] != impression[:-1]) | (time_us[1:] != time_us[:-1])
    version_of_event = np.cumsum(new) - 1
    first_event = np.flatnonzero(new)
    known_us = time_us[first_event] + AFTER_US
    owner = impression[first_event]
    last_of_owner = np.searchsorted(owner, owner, side="right") - 1
    end_us = np.full(len(owner), NEVER_US, dtype=np.int64)
    follows = np.flatnonzero(owner[1:] == owner[:-1])
    end_us[follows] = known_us[follows + 1]
    stating = np.lexsort((time_us, rows["kind"].to_numpy(), -(-(time_us + AFTER_US) // grid_us), impression))
    facts = rows.take(pa.array(stating[np.searchsorted(impression, owner, side="left")]))
    count = last_of_owner[version_of_event] - version_of_event + 1
    events_in = np.repeat(np.arange(len(impression)), count)
    starts = np.repeat(np.concatenate([[0], np.cumsum(count)[:-1]]) if len(count) else count, count)
    versions_in = version_of_event[events_in] + np.arange(len(events_in)) - starts
    labelled = label_impressions(
        _impressions(facts, behind_us), _outcomes(rows, time_us, events_in, versions_in), _videos(facts)
    )
    events = Events.from_labels(labelled)
    # The viewer's history shows the clock's time of an impression.
    shown_us, video = facts["shown_us"].to_numpy(), facts["video_id"].to_numpy()
    events = replace(events, impression_id=owner, video_id=video, event_us=shown_us, known_us=known_us)
    return Versions(events, end_us)


def _impressions(facts: pa.Table, behind_us: int) -> pa.Table:
    """Returns one impression per version. Impression and video have the version's number as their ids."""
    n = facts.num_rows
    nothing = pa.array([""] * n).dictionary_encode()
    columns = {
        "impression_id": np.arange(n), "request_id": np.arange(n), "viewer_id": facts["viewer_id"],
        "video_id": np.arange(n), "position": np.zeros(n, np.int16),
        "event_time": pa.array(facts["shown_us"].to_numpy() - behind_us).cast(TIMESTAMP_TYPE), "release": nothing,
        "arm": nothing, "source": nothing, "propensity": np.ones(n, np.float32), "device": nothing,
    }  # fmt: skip
    return pa.table([columns[name] for name in IMPRESSIONS.names], names=IMPRESSIONS.names).cast(IMPRESSIONS)


def _outcomes(rows: pa.Table, time_us: I64, events: I64, versions: I64) -> pa.Table:
    """Returns the outcomes of each version."""
    kind = rows["kind"].to_numpy()[events]
    events, versions, kind = events[kind != EXPOSED], versions[kind != EXPOSED], kind[kind != EXPOSED]
    types = pa.DictionaryArray.from_arrays(pa.array(kind.astype(np.int32)), pa.array([str(k) for k in OUTCOME_TYPES]))
    columns = {
        "outcome_id": np.arange(len(events)), "impression_id": versions,
        "viewer_id": rows["viewer_id"].to_numpy()[events], "video_id": rows["video_id"].to_numpy()[events],
        "type": types, "value": rows["value"].to_numpy()[events],
        "event_time": pa.array(time_us[events]).cast(TIMESTAMP_TYPE),
    }  # fmt: skip
    return pa.table([columns[name] for name in OUTCOMES.names], schema=OUTCOMES)


def _videos(facts: pa.Table) -> pa.Table:
    """Returns a video per version, as the version's event stated it."""
    stated = facts.select(["creator_id", "topic", "duration_ms"])
    return stated.add_column(0, "video_id", pa.array(np.arange(facts.num_rows))).combine_chunks()
