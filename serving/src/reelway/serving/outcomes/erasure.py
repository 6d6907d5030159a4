"""Erases viewers from the outcome collector's file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from reelway.platform.erasure.request import ErasedStore, ErasureRequest, ErasureState, erased_store
from reelway.platform.errors import StorageError
from reelway.platform.sqlite_file import is_held_elsewhere
from reelway.serving.outcomes.outcome_store import OutcomeStore

STORE = "outcome collector"


def erase_outcome_store(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Deletes the totals of the viewers. A collector that holds the file does so when it reads the event log.

    Raises:
        StorageError: if the file cannot be read or written.
    """
    path = request.outcomes or request.run.path / "serving" / "outcomes.db"
    if not path.exists():
        return
    ids = np.array(request.viewer_ids, np.int64)
    try:
        with closing(OutcomeStore(path, wait_s=0.5)) as store, store.erasing():
            found = store.count_viewers(ids) if request.dry_run else store.erase_viewers(ids)
    except StorageError as error:
        if not is_held_elsewhere(error):
            raise
        yield ErasedStore(STORE, str(path), 0, 0, ErasureState.PENDING, "held by the running service")
        return
    yield erased_store(request, STORE, path, found)
