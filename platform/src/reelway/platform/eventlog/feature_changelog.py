"""A changelog of streamed features, from the stream processor to the video table of every replica: numbered files.

::

    overlay/snapshot-{sequence:020d}.arrow    every row as of that change
    overlay/{sequence:020d}.arrow             one change after it

A change holds complete rows of views by entity. The newest row of an entity is current; a row of nulls means that the
entity's row has expired. Files are written atomically and never changed; a snapshot replaces the changes up to it.
There is one writer and any number of readers, which may start at any time and miss nothing.
"""

# Shapes: N rows

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec
import pyarrow as pa

from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.contracts.feature_names import CREATOR_STATISTICS, VIDEO_ENGAGEMENT
from reelway.platform.errors import DataError, StorageError

ENGAGEMENT: Final = "video_engagement"
CREATORS: Final = "creator_statistics"
FIELDS: Final = {ENGAGEMENT: VIDEO_ENGAGEMENT, CREATORS: CREATOR_STATISTICS}
CHANGES: Final = pa.schema(
    [
        pa.field("view", pa.string(), nullable=False),
        pa.field("entity_id", pa.int64(), nullable=False),  # video, or creator
        pa.field("event_timestamp", TIMESTAMP_TYPE, nullable=False),
        *(pa.field(name, pa.float32()) for fields in FIELDS.values() for name in fields),
    ]
)
"""Rows of both views; the fields of the other view are null."""
_AS_OF_METADATA_KEY: Final = b"as_of_us"
_CHANGE: Final = re.compile(r"(\d{20})\.arrow").fullmatch
_SNAPSHOT: Final = re.compile(r"snapshot-(\d{20})\.arrow").fullmatch
COMPACT_AFTER: Final = 64
"""Number of changes after which a snapshot is made."""


@dataclass(frozen=True)
class FeatureChange:
    """Rows of changed entities, and the time as of which all rows so far are current."""

    sequence: int
    as_of_us: int
    rows: pa.Table  # of the schema CHANGES
    is_snapshot: bool = False


def change_rows(view: str, entity_ids: pa.Array, times: pa.Array, fields: pa.Table) -> pa.Table:
    """Rows of one view in the schema ``CHANGES``."""
    fields_of_view = FIELDS[view]
    columns = {
        "view": pa.array([view] * len(entity_ids), pa.string()),
        "entity_id": entity_ids,
        "event_timestamp": times,
        **{name: fields[name] for name in fields_of_view},
    }
    return pa.table([columns.get(f.name, pa.nulls(len(entity_ids), f.type)) for f in CHANGES], schema=CHANGES)


def latest_rows(tables: list[pa.Table]) -> pa.Table:
    """Returns the last row of each (view, entity)."""
    rows = pa.concat_tables(tables)
    rows = rows.append_column("place", pa.array(range(rows.num_rows), pa.int64()))
    indices = rows.group_by(["view", "entity_id"]).aggregate([("place", "max")])["place_max"]
    return rows.drop_columns(["place"]).take(indices.combine_chunks().sort())


class FeatureChangelog:
    """The files at a path or fsspec URL. All methods block, and raise ``StorageError`` if the files are unreachable."""

    def __init__(self, location: str | Path) -> None:
        self._location = str(location)
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._location)
        except (ValueError, ImportError) as error:
            raise StorageError(f"changelog {self._location!r}: {error}; expected a path or an fsspec URL") from error
        self._local = self._files.protocol in ("file", ("file", "local"))

    def append(self, change: FeatureChange) -> None:
        """Writes a change. Writing the same change again has no effect."""
        self._write(f"{change.sequence:020d}.arrow", change)

    def compact(self, *, at_least: int = COMPACT_AFTER) -> bool:
        """Replaces the changes by a snapshot if there are ``at_least`` of them. Returns whether it did."""
        names = self._names()
        base, changes = _newest(names)
        if len(changes) < at_least:
            return False
        read = [self._read(names[base], base, is_snapshot=True)] if base else []
        read += [self._read(names[sequence], sequence) for sequence in changes]
        rows = latest_rows([change.rows for change in read])
        self._write(
            f"snapshot-{changes[-1]:020d}.arrow", FeatureChange(changes[-1], read[-1].as_of_us, rows, is_snapshot=True)
        )
        for name in names.values():  # a reader that is reading them lists the files again
            self._remove(name)
        return True

    def changes_after(self, sequence: int) -> list[FeatureChange]:
        """Returns the changes after ``sequence`` (0: all), oldest first.

        If the next change has been deleted, the list starts with the snapshot that replaced it.
        """
        for _ in range(10):
            names = self._names()
            base, changes = _newest(names)
            later = [change for change in changes if change > sequence]
            try:
                snapshot = [self._read(names[base], base, is_snapshot=True)] if -base > sequence else []
                return snapshot + [self._read(names[change], change) for change in later]
            except FileNotFoundError:
                continue  # a snapshot replaced them in the meantime
        raise StorageError(f"changelog {self._location}: files are deleted faster than they can be read; read again")

    def _names(self) -> dict[int, str]:
        """Returns the files by sequence. The sequence of a snapshot is negative."""
        try:
            found = self._files.ls(self._root, detail=False, refresh=True) if self._exists() else []
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageError(f"changelog {self._location}: cannot list it: {error}") from error
        names: dict[int, str] = {}
        for path in sorted(found):
            name = path.rsplit("/", 1)[-1]
            if match := _CHANGE(name):
                names.setdefault(int(match[1]), path)
            elif match := _SNAPSHOT(name):
                names[-int(match[1])] = path
        return names

    def _exists(self) -> bool:
        return bool(self._files.exists(self._root))

    def _read(self, path: str, sequence: int, *, is_snapshot: bool = False) -> FeatureChange:
        try:
            content = self._files.cat_file(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"changelog {path}: cannot read it: {error}") from error
        try:
            table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"changelog {path}: not an Arrow file: {error}") from error
        metadata = table.schema.metadata or {}
        rows = table.replace_schema_metadata(None)
        if not rows.schema.equals(CHANGES) or _AS_OF_METADATA_KEY not in metadata:
            raise DataError(f"changelog {path}: has schema\n{table.schema}\nexpected\n{CHANGES}")
        return FeatureChange(abs(sequence), int(metadata[_AS_OF_METADATA_KEY]), rows, is_snapshot)

    def _write(self, name: str, change: FeatureChange) -> None:
        table = change.rows.replace_schema_metadata({_AS_OF_METADATA_KEY: str(change.as_of_us).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content: Any = sink.getvalue()
        path = f"{self._root}/{name}"
        if self._local:
            with atomic_file(Path(path)) as temporary:
                temporary.write_bytes(content)
            return
        try:
            self._files.pipe_file(path, content.to_pybytes())
        except OSError as error:
            raise StorageError(f"changelog {path}: cannot write it: {error}") from error

    def _remove(self, path: str) -> None:
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"changelog {path}: cannot remove it: {error}") from error


def _newest(names: dict[int, str]) -> tuple[int, list[int]]:
    """Returns the newest snapshot as a key of ``names`` (0 if there is none), and the changes after it."""
    base = min((key for key in names if key < 0), default=0)
    return base, sorted(key for key in names if key > -base)
