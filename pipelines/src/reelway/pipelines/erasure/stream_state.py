"""Erases viewers from the state of the stream on one machine, and from the state of the live lists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from reelway.pipelines.features.stream.lists import ListWindows
from reelway.pipelines.features.stream.local_stream import erase_from_state
from reelway.pipelines.features.stream.run_inputs import view_settings, view_ttl_us
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.platform.erasure.request import ErasedStore, ErasureRequest, ErasureState, erased_store
from reelway.platform.errors import StorageError
from reelway.platform.eventlog.addresses import KAFKA
from reelway.platform.sqlite_file import is_held_elsewhere

STREAM = "stream state"
LISTS = "live lists"


def erase_stream_state(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Erases the viewers from the stream's file. A stream that runs does so when it reads the event log.

    On Kafka the state belongs to the members of the stream, which do the same.

    Raises:
        StorageError: if the file cannot be read or written.
    """
    path = request.stream_folder / "state.db"
    if request.events.startswith(KAFKA):
        note = "the stream's members erase it when they read the event log"
        yield ErasedStore(STREAM, request.events, 0, 0, ErasureState.PENDING, note)
    elif path.exists():
        yield _erase_local(request, path)
    yield from _erase_lists(request)


def _erase_local(request: ErasureRequest, path: Path) -> ErasedStore:
    ids = np.array(request.viewer_ids, np.int64)
    try:
        with closing(SqliteStore(path, wait_s=0.5)) as store:
            views, ttl_us = view_settings(request.run), view_ttl_us(request.run)
            found = erase_from_state(store, views, ttl_us, ids, dry_run=request.dry_run)
    except StorageError as error:
        if not is_held_elsewhere(error):
            raise
        return ErasedStore(STREAM, str(path), 0, 0, ErasureState.PENDING, "held by the running stream")
    return erased_store(request, STREAM, path, found)


def _erase_lists(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Erases the viewers' places. A running writer replaces the file within a minute, without them."""
    path = request.stream_folder / "lists.npz"
    if not path.exists():
        return
    windows = ListWindows()
    offsets = windows.restore(path)
    found = windows.erase(np.array(request.viewer_ids, np.int64))
    if found and not request.dry_run:
        windows.save(path, dict(offsets))
    yield erased_store(request, LISTS, path, found)
