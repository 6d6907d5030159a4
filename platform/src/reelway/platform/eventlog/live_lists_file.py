"""``lists.arrow``: the popular and trending videos of the last day, from the list task to every process of a release.

The list task replaces the file every few seconds. The file names videos by id and therefore serves all releases. Its
schema is that of ``popular.arrow``; its metadata states the time that the lists describe. The list ``popular`` and the
list ``trending`` are for all viewers; ``trending:region=eu`` and ``trending:language=de`` are for some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.release_files import POPULAR_SCHEMA
from reelway.platform.errors import DataError, StorageError

LISTS_FILE: Final = "lists.arrow"
MAX_AGE_S: Final = 600.0
"""Age from which on a release's own lists are better."""
POPULAR: Final = "popular"
TRENDING: Final = "trending"
_AS_OF_METADATA_KEY: Final = b"as_of_us"
_VERSION_FIELDS: Final = ("ino", "mtime", "ETag", "LastModified", "etag", "updated", "size")  # of any file system


@dataclass(frozen=True)
class RankedIds:
    """One list: video ids with their scores, best first."""

    video_ids: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class LiveListsSnapshot:
    """All lists as of one time."""

    as_of_us: int
    lists: Mapping[str, RankedIds]


def list_name(kind: str, dimension: str = "", value: str = "") -> str:
    """Returns the name of a list: ``trending`` for all viewers, ``trending:region=eu`` for a region's."""
    return f"{kind}:{dimension}={value}" if dimension else kind


class LiveListsFile:
    """``lists.arrow`` in an overlay folder, given as a path or fsspec URL. One process writes it.

    Raises:
        StorageError: if the URL is invalid, or the file cannot be read or written.
    """

    def __init__(self, overlay: str | Path) -> None:
        self._location = f"{str(overlay).rstrip('/')}/{LISTS_FILE}"
        try:
            self._files, self._path = fsspec.core.url_to_fs(self._location)
        except (ValueError, ImportError) as error:
            raise StorageError(f"lists {self._location!r}: {error}; expected a path or an fsspec URL") from error
        self._local = self._files.protocol in ("file", ("file", "local"))

    def write(self, snapshot: LiveListsSnapshot) -> None:
        """Replaces the file atomically."""
        lists = snapshot.lists
        lengths = [len(ranked.video_ids) for ranked in lists.values()]
        columns = [
            pa.array(np.repeat(np.array(list(lists), dtype=object), lengths), pa.string()),
            pa.array(np.concatenate([np.arange(length) for length in [0, *lengths]]), pa.int32()),
            pa.array(np.concatenate([np.empty(0, np.int64), *(r.video_ids for r in lists.values())]), pa.int64()),
            pa.array(np.concatenate([np.empty(0, np.float32), *(r.scores for r in lists.values())]), pa.float32()),
        ]
        schema = POPULAR_SCHEMA.with_metadata({_AS_OF_METADATA_KEY: str(snapshot.as_of_us).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        content: Any = sink.getvalue()
        if self._local:
            with atomic_file(Path(self._path)) as temporary:
                temporary.write_bytes(content)
            return
        try:
            self._files.pipe_file(self._path, content.to_pybytes())
        except OSError as error:
            raise StorageError(f"lists {self._location}: cannot write the file: {error}") from error

    def version(self) -> object:
        """Returns a value that changes with every write; None while the file does not exist."""
        try:
            self._files.invalidate_cache()
            info = self._files.info(self._path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"lists {self._location}: cannot read the file: {error}") from error
        return tuple(str(info.get(name)) for name in _VERSION_FIELDS)

    def read(self) -> LiveListsSnapshot | None:
        """Returns the lists, or None while the file does not exist.

        Raises:
            DataError: if the file is not an Arrow file of lists.
        """
        try:
            content = self._files.cat_file(self._path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"lists {self._location}: cannot read the file: {error}") from error
        try:
            table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"lists {self._location}: not an Arrow file: {error}") from error
        as_of = (table.schema.metadata or {}).get(_AS_OF_METADATA_KEY, b"")
        if not table.schema.equals(POPULAR_SCHEMA) or not as_of.isdigit():
            raise DataError(
                f"lists {self._location}: has schema\n{table.schema}\nexpected\n{POPULAR_SCHEMA}\nwith as_of_us"
            )
        names = table["list"].to_numpy()
        rank, video_id, score = (table[name].to_numpy() for name in ("rank", "video_id", "score"))
        lists = {}
        for name in dict.fromkeys(names.tolist()):
            rows = np.flatnonzero(names == name)
            rows = rows[np.argsort(rank[rows], kind="stable")]
            lists[str(name)] = RankedIds(video_id[rows], score[rows])
        return LiveListsSnapshot(int(as_of), lists)
