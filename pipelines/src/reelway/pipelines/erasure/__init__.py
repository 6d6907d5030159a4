"""Erases viewers from the stores of ``reelway.pipelines``: data sets with their features, and the stream's state."""

from __future__ import annotations

from collections.abc import Iterator

from reelway.platform.erasure.request import ErasedStore, ErasureRequest


def erase_pipeline_stores(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Erases the viewers.

    Raises:
        StorageError: if a file cannot be read or written.
        MalformedFileError: if a file is damaged.
    """
    from reelway.pipelines.erasure.stream_state import erase_stream_state
    from reelway.pipelines.erasure.tables import erase_tables

    yield from erase_stream_state(request)
    yield from erase_tables(request)
