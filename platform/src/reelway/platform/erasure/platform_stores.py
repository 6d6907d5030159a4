"""Erases viewers from the stores of ``reelway.platform``: event log, parity log, parked records, online store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np

from reelway.platform.erasure.event_topics import erase_from_topics
from reelway.platform.erasure.request import ErasedStore, ErasureRequest, erased_store
from reelway.platform.erasure.vector_logs import erase_vectors
from reelway.platform.errors import DataError
from reelway.platform.eventlog.erasures import viewer_rows
from reelway.platform.eventlog.parked_records import ParkedRecord, ParkedRecords
from reelway.platform.features.feast_store import CONFIG_FILE, open_feature_store
from reelway.platform.features.viewer_memory import MEMORY_FILE, open_viewer_memory
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory
from reelway.platform.features.viewer_row_erasure import erase_viewer_rows


def erase_platform_stores(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Erases the viewers, first from the event log: its readers then write nothing about them any more.

    Raises:
        FeatureError: if the online store cannot be read or written.
        StorageError: if another store cannot be read or written.
    """
    yield from erase_from_topics(request)
    location = request.vector_log or str(request.run.path / "serving" / "vectors.jsonl")
    found = erase_vectors(location, request.viewer_ids, dry_run=request.dry_run)
    yield erased_store(request, "parity log", location, found)
    yield from _erase_parked(request)
    yield from _erase_online(request)


def _erase_parked(request: ErasureRequest) -> Iterator[ErasedStore]:
    path = request.stream_folder / "parked.db"
    if not path.exists():
        return
    ids = np.array(request.viewer_ids, np.int64)

    def concerns(record: ParkedRecord) -> bool:
        try:
            return bool(viewer_rows(record.payload, ids)) if record.payload else False
        except DataError:
            return True  # an unreadable record may contain the viewer

    with closing(ParkedRecords(path)) as parked:
        found = parked.count(concerns) if request.dry_run else parked.delete(concerns)
    note = "unreadable records are deleted too" if found else ""
    yield erased_store(request, "parked records", path, found, note=note)


def _erase_online(request: ErasureRequest) -> Iterator[ErasedStore]:
    folder = request.run.features
    if not (folder / CONFIG_FILE).exists():
        return
    store = open_feature_store(folder)
    location = "sqlite" if store.config.online_store.type == "sqlite" else "redis"
    rows = erase_viewer_rows(store, request.viewer_ids, dry_run=request.dry_run)
    yield erased_store(request, "online store", location, rows)
    if location == "sqlite" and not (folder / MEMORY_FILE).exists():
        return
    with ExitStack() as stack:
        memory = open_viewer_memory(store)
        if isinstance(memory, SqliteViewerMemory):
            stack.callback(memory.close)
        change = memory.count_entries if request.dry_run else memory.forget
        found = sum(change(viewer) for viewer in request.viewer_ids)
    yield erased_store(request, "viewer memory", location, found)
