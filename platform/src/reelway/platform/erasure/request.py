"""What to erase where, and what was found. Types only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from reelway.platform.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class ErasureRequest:
    """The viewers to erase and the stores of their service; empty values mean the run's own files."""

    run: RunDirectory
    viewer_ids: tuple[int, ...]
    dry_run: bool = False
    events: str = ""  # address of the event log
    vector_log: str = ""  # file, folder or URL of the parity log
    outcomes: Path | None = None  # file of the outcome collector
    stream_state: Path | None = None  # folder of the stream's state

    @property
    def events_address(self) -> str:
        return self.events or str(self.run.events)

    @property
    def stream_folder(self) -> Path:
        return self.stream_state or self.run.path / "stream"


class ErasureState(StrEnum):
    """State of one store after an erasure."""

    ERASED = "erased"  # nothing about the viewers is left
    FOUND = "found"  # a dry run left what it found
    PENDING = "pending"  # another process holds the store and erases the viewers when it reads the event log
    HIDDEN = "hidden"  # no reader uses the rows any more; the store's retention deletes them


@dataclass(frozen=True, slots=True)
class ErasedStore:
    """What was found and removed in one store. It names no viewer."""

    store: str
    location: str
    found: int
    removed: int
    state: ErasureState
    note: str = ""


Eraser = Callable[[ErasureRequest], Iterator[ErasedStore]]


def erased_store(request: ErasureRequest, store: str, location: object, found: int, *, note: str = "") -> ErasedStore:
    """Returns the result of a store whose rows were deleted, unless it is a dry run."""
    if request.dry_run:
        return ErasedStore(store, str(location), found, 0, ErasureState.FOUND, note)
    return ErasedStore(store, str(location), found, found, ErasureState.ERASED, note)
