"""Catalogue changes as records of the event log: uploads and updates of videos, takedowns and restorations.

::

    upsert of a video                              topic ``catalogue``, key ``video:<id>``
    takedown, restoration of a video or creator    topic ``takedowns``, key ``video:<id>`` or ``creator:<id>``

A record is one change as JSON. Every change has a version; the newest version of a key wins, in whatever order the
records arrive. Two different changes of one key with the same version are ordered by their content, and a takedown
comes before a restoration. Readers ignore fields that they do not know, so a field may be added if it has a default.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.eventlog.event_log import LogRecord, StoredRecord
from reelway.platform.eventlog.topics import Topic

_SHOWN_CHARACTERS: Final = 100
"""Longest part of a field's path in an error: an unknown key is part of the path."""
I64 = NDArray[np.int64]
Id = Annotated[int, Field(ge=0, le=MAX_ID)]
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=4096, fail_fast=True)
]
Text = Annotated[str, Field(max_length=1000)]


def _now_us() -> int:
    return time.time_ns() // 1000


class _Change(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Annotated[int, Field(ge=0, lt=1 << 62)] = Field(default_factory=_now_us)
    """Newer changes of a key have larger versions; by default the microseconds of the present time."""

    def payload(self) -> bytes:
        """Returns the change as JSON, which ``decode_changes`` reads."""
        return self.model_dump_json(exclude_none=True).encode()


class VideoUpsert(_Change):
    """The complete content of a video, uploaded or updated: the columns of ``events.VIDEOS`` and a version."""

    op: Literal["upsert"] = "upsert"
    video_id: Id
    creator_id: Id
    uploaded_at: AwareDatetime
    duration_ms: Annotated[int, Field(ge=0, lt=1 << 31)]
    topic: Annotated[int, Field(ge=-1, lt=1 << 31)] = -1
    language: Text | None = None
    title: Text | None = None
    visual: Vector | None = None
    audio: Vector | None = None
    text: Vector | None = None

    @property
    def key(self) -> str:
        return f"video:{self.video_id}"

    @cached_property
    def precedence(self) -> tuple[int, int]:
        """The version, and a digest of the content that orders different changes of one version."""
        digest = hashlib.blake2b(self.payload(), digest_size=8).digest()
        return self.version, int.from_bytes(digest, "big") >> 2

    def problem(self, dimensions: FeatureDimensions) -> str | None:
        """Returns what does not fit the dimensions of a data set, or None."""
        if self.topic >= dimensions.topics:
            return f"topic: saw {self.topic}, expected -1..{dimensions.topics - 1}"
        for name, width in dimensions.content.items():
            values = getattr(self, name)
            if values is not None and len(values) != width:
                return f"{name}: saw {len(values)} values, expected {width} or none"
        return None


class _StatusChange(_Change):
    video_id: Id | None = None
    creator_id: Id | None = None

    @model_validator(mode="after")
    def _names_one_entity(self) -> _StatusChange:
        if (self.video_id is None) == (self.creator_id is None):
            raise ValueError("expected either video_id or creator_id")
        return self

    @property
    def key(self) -> str:
        return f"creator:{self.creator_id}" if self.video_id is None else f"video:{self.video_id}"


class Takedown(_StatusChange):
    """A video, or all videos of a creator, may not be shown any more."""

    op: Literal["takedown"] = "takedown"
    reason: Annotated[str, Field(min_length=1, max_length=1000)]

    @property
    def precedence(self) -> tuple[int, bool, str]:
        """The version; of equal versions a takedown wins, then the larger reason."""
        return self.version, True, self.reason


class Restore(_StatusChange):
    """Takes back a takedown. A video stays hidden while its creator is taken down."""

    op: Literal["restore"] = "restore"
    reason: Text = ""

    @property
    def precedence(self) -> tuple[int, bool, str]:
        """The version; of equal versions a takedown wins, then the larger reason."""
        return self.version, False, self.reason


StatusChange = Takedown | Restore
CatalogueChange = Annotated[VideoUpsert | Takedown | Restore, Field(discriminator="op")]
_CHANGE: Final[TypeAdapter[VideoUpsert | Takedown | Restore]] = TypeAdapter(CatalogueChange)
_CHANGES: Final[TypeAdapter[list[VideoUpsert | Takedown | Restore]]] = TypeAdapter(list[CatalogueChange])


def parse_change(value: Any) -> VideoUpsert | Takedown | Restore:
    """Returns one change from a parsed JSON object with the field ``op``.

    Raises:
        ValidationError: if the object is not a change.
    """
    return _CHANGE.validate_python(value)


def explain_first_problem(error: ValidationError) -> str:
    """Returns pydantic's first error on one line: field, value seen, expectation."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"] if part not in ("upsert", "takedown", "restore")]
    field = ".".join(part[:_SHOWN_CHARACTERS] for part in location)
    if problem["type"] == "missing":
        return f"{field}: missing"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    seen = "" if problem["type"] == "value_error" else f"saw {str(problem['input'])[:80]!r}, expected "
    return f"{field}: {seen}{expected}" if field else f"{seen}{expected}"


def topic_of(change: VideoUpsert | Takedown | Restore) -> Topic:
    """Returns the topic that a change belongs to."""
    return Topic.CATALOGUE if isinstance(change, VideoUpsert) else Topic.TAKEDOWNS


def as_record(change: VideoUpsert | Takedown | Restore, partitions: int) -> LogRecord:
    """Returns the record of a change. All changes of a key share a partition."""
    partition = zlib.crc32(change.key.encode()) % partitions
    return LogRecord(uuid4().hex, partition, change.payload(), change.key)


def decode_upserts(records: Sequence[StoredRecord]) -> tuple[list[VideoUpsert | None], int]:
    """Returns the upsert of each record, None for an unreadable one, and the number of unreadable records.

    Empty payloads, which Kafka keeps as tombstones, are None and not counted.
    """
    upserts = [change if isinstance(change, VideoUpsert) else None for change in _decode_all(records)]
    return upserts, _count_unreadable(records, upserts)


def decode_status_changes(records: Sequence[StoredRecord]) -> tuple[list[StatusChange | None], int]:
    """Returns the takedown or restoration of each record; otherwise the same as ``decode_upserts``."""
    changes = [change if isinstance(change, Takedown | Restore) else None for change in _decode_all(records)]
    return changes, _count_unreadable(records, changes)


def _count_unreadable(records: Sequence[StoredRecord], decoded: Sequence[object | None]) -> int:
    return sum(change is None and bool(record.payload) for change, record in zip(decoded, records, strict=True))


def _decode_all(records: Sequence[StoredRecord]) -> list[Any]:
    try:  # one call for all records: the usual case
        changes: list[Any] = _CHANGES.validate_json(
            b"[" + b",".join(record.payload for record in records) + b"]", extra="ignore"
        )
    except ValidationError:
        return [_decode(record.payload) for record in records]
    return changes if len(changes) == len(records) else [_decode(record.payload) for record in records]


def _decode(payload: bytes) -> VideoUpsert | Takedown | Restore | None:
    try:
        return _CHANGE.validate_json(payload, extra="ignore")
    except ValidationError:
        return None


@dataclass(frozen=True)
class TakenDown:
    """The videos and creators that may not be shown, ascending."""

    videos: I64
    creators: I64


NOTHING_TAKEN_DOWN: Final = TakenDown(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


class ChangedStatus(NamedTuple):
    """Videos and creators whose status changed."""

    videos: I64
    creators: I64

    def __bool__(self) -> bool:
        return bool(len(self.videos) or len(self.creators))


class TakedownState:
    """The newest takedown or restoration of every video and creator. The order of the changes has no influence."""

    def __init__(self) -> None:
        self._newest: dict[str, StatusChange] = {}
        self._taken_down = NOTHING_TAKEN_DOWN

    def apply(self, changes: Iterable[StatusChange]) -> ChangedStatus:
        """Takes changes in any order, repeated or not. Returns the entities that are now of another status."""
        before: dict[str, StatusChange | None] = {}
        for change in changes:
            newest = self._newest.get(change.key)
            if newest is None or change.precedence > newest.precedence:
                before.setdefault(change.key, newest)
                self._newest[change.key] = change
        changed = [self._newest[key] for key, old in before.items() if _is_down(old) != _is_down(self._newest[key])]
        status = ChangedStatus(
            _ids(change.video_id for change in changed), _ids(change.creator_id for change in changed)
        )
        if status:  # an entity whose status changed leaves the set, or enters it
            down = self._taken_down
            self._taken_down = TakenDown(
                np.setxor1d(down.videos, status.videos, assume_unique=True),
                np.setxor1d(down.creators, status.creators, assume_unique=True),
            )
        return status

    def taken_down(self) -> TakenDown:
        """Returns the present takedowns."""
        return self._taken_down

    def takedowns(self) -> list[Takedown]:
        """Returns the takedowns that are in effect, oldest version first."""
        down = [change for change in self._newest.values() if isinstance(change, Takedown)]
        return sorted(down, key=lambda change: (change.version, change.key))


def _is_down(change: StatusChange | None) -> bool:
    return isinstance(change, Takedown)


def _ids(values: Iterable[int | None]) -> I64:
    return np.array(sorted(value for value in values if value is not None), dtype=np.int64)
