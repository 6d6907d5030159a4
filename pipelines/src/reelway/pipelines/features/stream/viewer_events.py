"""Exposures and outcomes as columns, in the form that the stream's tasks apply them."""

# Shapes: N events

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.features.windows import I64
from reelway.platform.eventlog.erasures import anonymised_ids

EXPOSURE: Final = -1
"""Kind of an exposure. The kind of an outcome is its index in ``OUTCOME_TYPES``."""


@dataclass(frozen=True)
class ViewerEvents:
    """Exposures and outcomes, ``[N]``, in the log's order."""

    impression_id: I64
    viewer_id: I64
    video_id: I64
    creator_id: I64
    topic: I64  # -1: no topic
    duration_ms: I64
    shown_us: I64  # when the video was shown, not after the record's append
    kind: I64
    value: NDArray[np.float32]
    time_us: I64  # append time of the record; the event counts from AFTER_US later

    def __len__(self) -> int:
        return len(self.impression_id)

    def take(self, rows: NDArray[Any]) -> ViewerEvents:
        return ViewerEvents(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def anonymised(self, erased: I64) -> ViewerEvents:
        """Returns the events with anonymous ids for erased viewers ``[E]``."""
        return replace(self, viewer_id=anonymised_ids(self.viewer_id, self.impression_id, erased))

    @classmethod
    def joined(cls, parts: Sequence[ViewerEvents]) -> ViewerEvents:
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__})

    @classmethod
    def none(cls) -> ViewerEvents:
        return cls.unpacked(b"")

    def packed(self) -> bytes:
        """Returns the events as bytes."""
        packed: NDArray[np.void] = np.empty(len(self), dtype=_PACKED)
        for name in self.__dataclass_fields__:
            packed[name] = getattr(self, name)
        return packed.tobytes()

    @classmethod
    def unpacked(cls, content: bytes) -> ViewerEvents:
        packed = np.frombuffer(content, dtype=_PACKED)
        return cls(**{name: np.ascontiguousarray(packed[name]) for name in cls.__dataclass_fields__})


_PACKED: Final = np.dtype([(name, "<f4" if name == "value" else "<i8") for name in ViewerEvents.__dataclass_fields__])
