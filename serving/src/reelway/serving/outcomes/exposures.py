"""Slates that were shown, as arrays, and as rows of the event log."""

# Shapes: N videos of one slate, R rows: the videos of all slates of a batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.events import Arm
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA
from reelway.serving.outcomes.record_columns import dictionary_column, timestamp_column
from reelway.serving.stages.arrays import SOURCES


class ArmKey(NamedTuple):
    """Key of one arm of a rollout. An arm with another release has another key."""

    rollout: str  # empty outside of a rollout
    arm: Arm
    release: str


@dataclass(frozen=True, slots=True)
class SlateExposure:
    """One slate as it was shown. All arrays have shape ``[N]``; the order is that of the positions."""

    request_id: int
    viewer_id: int
    arm: ArmKey
    weight: float  # sequential.overlap_weight of the arms, as in the tokens
    shown_at_s: float
    request_time_s: float
    device: str
    region: str | None
    language: str | None
    impression_id: NDArray[np.int64]
    video_id: NDArray[np.int64]
    slices: NDArray[np.int8]  # sums of tokens.SLICE_BITS
    source: NDArray[np.integer[Any]]  # index into SOURCES
    score: NDArray[np.float32]
    propensity: NDArray[np.float32]
    creator_id: NDArray[np.int64]
    topic: NDArray[np.int32]
    duration_ms: NDArray[np.int32]
    authenticated: bool = False  # whether the viewer proved its identity

    def __len__(self) -> int:
        return len(self.video_id)


def exposure_rows(slates: Sequence[SlateExposure]) -> pa.RecordBatch:
    """Returns the slates in the schema ``EXPOSURE_EVENT_SCHEMA``, one after the other. ``slates`` is not empty."""
    size = [len(slate) for slate in slates]
    slate_R = np.repeat(np.arange(len(slates)), size)

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(slate, name) for slate in slates])

    def repeated(name: str, dtype: type[np.generic]) -> NDArray[Any]:
        return np.array([getattr(slate, name) for slate in slates], dtype)[slate_R]

    def text(strings: Sequence[str | None]) -> pa.Array:
        return dictionary_column([(slate_R, strings)])

    columns: dict[str, NDArray[Any] | pa.Array] = {
        "request_id": repeated("request_id", np.int64),
        "viewer_id": repeated("viewer_id", np.int64),
        "position": np.concatenate([np.arange(length, dtype=np.int16) for length in size]),
        "shown_at": timestamp_column(repeated("shown_at_s", np.float64) * 1e6),
        "request_time": timestamp_column(repeated("request_time_s", np.float64) * 1e6),
        "release": text([slate.arm.release for slate in slates]),
        "arm": text([slate.arm.arm.value for slate in slates]),
        "rollout": text([slate.arm.rollout for slate in slates]),
        "weight": repeated("weight", np.float32),
        "authenticated": repeated("authenticated", np.bool_),
        "source": dictionary_column([(joined("source"), SOURCES)]),
        "device": text([slate.device for slate in slates]),
        "region": text([slate.region for slate in slates]),
        "language": text([slate.language for slate in slates]),
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for field in EXPOSURE_EVENT_SCHEMA
        for column in [columns.get(field.name) if field.name in columns else joined(field.name)]
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=EXPOSURE_EVENT_SCHEMA)
