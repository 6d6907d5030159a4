"""Rebuilds the viewers' memory from the event log when its store is new or has lost its data.

Routers write to the same store meanwhile. What they wrote stays newer than what is restored, and everything that is
written twice counts once, so a rebuild may run at any time, twice, or be killed and repeated.
"""

# Shapes: N rows of a partition

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reelway.pipelines.features.labels import times_us
from reelway.platform.contracts.blend import MAX_SHOWN_HOURS, MAX_SHOWN_VIDEOS, MAX_WATCHED_DAYS
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.errors import DataError
from reelway.platform.eventlog.erasures import erased_viewers, of_known_viewers, rows_kept
from reelway.platform.eventlog.event_log import EventLog, StoredRecord
from reelway.platform.eventlog.exposure_events import decode_exposures
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.retained_records import records_of_partition
from reelway.platform.features.viewer_memory import ViewerMemory
from reelway.platform.features.watched_filter import GENERATION_DAYS

log = logging.getLogger(__name__)

_APPEND_MARGIN_US: Final = 3_600_000_000
"""How long before a video is shown its record may be in the log, by clocks that differ."""
_CHOICES: Final = (
    (OutcomeType.BLOCK_CREATOR, "creator_id"),
    (OutcomeType.BLOCK_TOPIC, "topic"),
    (OutcomeType.FOLLOW, "creator_id"),
)


@dataclass(frozen=True, slots=True)
class RebuiltMemory:
    """What a rebuild wrote."""

    shown: int = 0  # videos
    watched: int = 0  # videos that were watched to the end
    choices: int = 0  # blocks and follows
    unreadable: int = 0  # records that were skipped


def rebuild_viewer_memory(
    memory: ViewerMemory, exposures: EventLog, outcomes: EventLog, now_s: float, stop: threading.Event
) -> RebuiltMemory | None:
    """Reads the log up to its present end into the memory, unless the memory has its marker. Sets the marker.

    Memory use is bounded by the exposures that one partition has in ``MAX_SHOWN_HOURS``.

    Args:
        exposures: the topic ``exposures``.
        outcomes: the topic ``outcomes``.
        now_s: Unix seconds; older exposures than ``MAX_SHOWN_HOURS`` before are not read into the memory.
        stop: ends the rebuild early, without the marker.

    Returns:
        What was written; ``None`` if the memory was complete, or the rebuild was stopped.

    Raises:
        StorageError: if the log cannot be read or the memory cannot be written. The marker is not set then.
    """
    if memory.is_complete():
        return None
    # Outcomes first: an erasure among them deletes the viewer's whole memory.
    watched, choices, unreadable_outcomes = _restore_outcomes(memory, outcomes, now_s, stop)
    shown, unreadable = _restore_exposures(memory, exposures, now_s, stop)
    if stop.is_set():
        return None
    memory.mark_complete()
    rebuilt = RebuiltMemory(shown, watched, choices, unreadable + unreadable_outcomes)
    log.info("viewer memory rebuilt from the event log: %s", rebuilt)
    return rebuilt


def _restore_exposures(
    memory: ViewerMemory, exposures: EventLog, now_s: float, stop: threading.Event
) -> tuple[int, int]:
    restored = unreadable = 0
    oldest_us = int((now_s - MAX_SHOWN_HOURS * 3600.0) * 1e6)
    ends, firsts = exposures.end_offsets(), exposures.offsets_at(oldest_us - _APPEND_MARGIN_US)
    for partition in sorted(ends):
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for record in records_of_partition(exposures, partition, firsts[partition], ends):
            if stop.is_set():
                return restored, unreadable
            if len(erased := erased_viewers(record.payload)):
                parts = [_without(part, erased) for part in parts]
            table = _decoded(record, exposures.name, is_outcome=False)
            if table is None:
                unreadable += 1
                continue
            shown_us = times_us(table["shown_at"])
            viewer_video_N2 = np.stack([table["viewer_id"].to_numpy(), table["video_id"].to_numpy()], axis=1)
            recent = shown_us >= oldest_us
            parts.append((viewer_video_N2[recent], shown_us[recent]))
        if parts:
            restored += _restore_viewers(
                memory, np.concatenate([part for part, _ in parts]), np.concatenate([part for _, part in parts]), stop
            )
    return restored, unreadable


def _without(part: tuple[np.ndarray, np.ndarray], erased: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    viewer_video_N2, shown_us = part
    kept = rows_kept(viewer_video_N2[:, 0], erased)
    return viewer_video_N2[kept], shown_us[kept]


def _restore_viewers(
    memory: ViewerMemory, viewer_video_N2: np.ndarray, shown_us: np.ndarray, stop: threading.Event
) -> int:
    """Restores the newest videos of each viewer; a slate that is in the log twice counts once."""
    restored = 0
    order = np.lexsort((shown_us, viewer_video_N2[:, 0]))
    rows, times_N = viewer_video_N2[order], shown_us[order]
    bounds = np.flatnonzero(np.diff(rows[:, 0], prepend=-1, append=-1))
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop.is_set():
            return restored
        _, distinct = np.unique(np.stack([rows[first:end, 1], times_N[first:end]], axis=1), axis=0, return_index=True)
        kept = first + np.sort(distinct)[-MAX_SHOWN_VIDEOS:]
        memory.restore_shown(int(rows[first, 0]), rows[kept, 1], times_N[kept] / 1e6)
        restored += len(kept)
    return restored


def _restore_outcomes(
    memory: ViewerMemory, outcomes: EventLog, now_s: float, stop: threading.Event
) -> tuple[int, int, int]:
    watched = choices = unreadable = 0
    oldest_us = int((now_s - (MAX_WATCHED_DAYS + GENERATION_DAYS) * 86_400.0) * 1e6)
    ends = outcomes.end_offsets()
    for partition in sorted(ends):
        for record in records_of_partition(outcomes, partition, None, ends):
            if stop.is_set():
                return watched, choices, unreadable
            for viewer in erased_viewers(record.payload).tolist():
                memory.forget(viewer)
            table = _decoded(record, outcomes.name, is_outcome=True)
            if table is None:
                unreadable += 1
                continue
            types = table["type"].cast(pa.string())
            to_the_end = table.filter(
                pc.and_(
                    pc.equal(types, OutcomeType.WATCH.value),
                    pc.and_(
                        pc.greater(table["duration_ms"], 0),
                        pc.greater_equal(table["value"], table["duration_ms"].cast(pa.float32(), safe=False)),
                    ),
                )
            )
            times_N = times_us(to_the_end["event_time"])
            live = times_N >= oldest_us
            if live.any():
                memory.remember_watched(
                    to_the_end["viewer_id"].to_numpy()[live], to_the_end["video_id"].to_numpy()[live],
                    times_N[live] / 1e6,
                )  # fmt: skip
                watched += int(live.sum())
            choices += _restore_choices(memory, table, types)
    return watched, choices, unreadable


def _restore_choices(memory: ViewerMemory, table: pa.Table, types: pa.ChunkedArray) -> int:
    """Restores blocks and follows."""
    choices = 0
    for kind, column in _CHOICES:
        chosen = table.filter(pc.and_(pc.equal(types, kind.value), pc.is_valid(table[column])))
        for viewer_id, id_ in zip(chosen["viewer_id"].to_pylist(), chosen[column].to_pylist(), strict=True):
            if kind is OutcomeType.FOLLOW:
                memory.follow(viewer_id, [id_])
            else:
                memory.block(viewer_id, **{"creators" if column == "creator_id" else "topics": [id_]})
            choices += 1
    return choices


def _decoded(record: StoredRecord, name: str, *, is_outcome: bool) -> pa.Table | None:
    try:
        return of_known_viewers((decode_outcomes if is_outcome else decode_exposures)(record.payload))
    except DataError as error:
        log.warning("record skipped: topic=%s partition=%d offset=%d: %s", name, record.partition, record.offset, error)
        return None
