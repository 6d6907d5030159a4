"""Erases viewers from the Parquet files of a run: data set, features, training rows, copies of the event log.

Every Parquet file of the run with a column ``viewer_id`` is covered, whichever step wrote it, and the two tables of a
data set that hold ids in other columns. Rows are removed. In the labels and in the copy of the event log, from which
parity recomputes counts of videos, the viewers become anonymous instead. A file is rewritten a batch of rows at a time,
beside the old one, which it then replaces. Files without rows of the viewers stay as they are.
"""

# Shapes: N rows of a batch

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reelway.pipelines.datasets.checks import REJECTED
from reelway.pipelines.datasets.id_mapping import ID_MAP
from reelway.pipelines.datasets.store import INFO_FILE
from reelway.pipelines.features.training_rows import LABELS_FILE
from reelway.platform.atomic_files import atomic_file, write_json
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.erasure.request import ErasedStore, ErasureRequest, erased_store
from reelway.platform.errors import MalformedFileError, StorageError
from reelway.platform.eventlog.erasures import anonymised, rows_kept

BATCH_ROWS: Final = 16_384
_STORES: Final = {"dataset": "data set", "features": "features", "parity": "event copy"}
"""First folder below the run -> name in the report."""
_OTHER: Final = "other tables"

Kept = Callable[[pa.RecordBatch], NDArray[np.bool_]]
"""Which rows of a batch stay, ``[N]``."""


def erase_tables(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Erases the viewers from all Parquet files of the run, and corrects the row counts in ``dataset.json``."""
    viewer_ids = np.array(request.viewer_ids, np.int64)
    found: Counter[str] = Counter(dict.fromkeys([*_STORES.values(), _OTHER], 0))
    for path in _files(request.run.path):
        parts = path.relative_to(request.run.path).parts
        counted = parts == ("features", LABELS_FILE) or parts[:2] == ("parity", "events")
        found[_STORES.get(parts[0], _OTHER)] += erase_from_file(
            path, viewer_ids, anonymise=counted, dry_run=request.dry_run
        )
    if not request.dry_run:
        _correct_counts(request.run.dataset)
    for store, rows in found.items():
        if rows or store != _OTHER:
            yield erased_store(request, store, request.run.path, rows)


def erase_from_file(
    path: Path, viewer_ids: NDArray[np.int64], *, anonymise: bool = False, dry_run: bool = False
) -> int:
    """Removes the viewers' rows from a Parquet file, or makes them anonymous. Returns their number.

    Raises:
        MalformedFileError: if the file is no Parquet file.
        StorageError: if it cannot be written; it is unchanged then.
    """
    try:
        with pq.ParquetFile(path) as source:
            schema = source.schema_arrow
            rule = _rule(schema, viewer_ids)
            if rule is None:
                return 0
            columns, kept = rule
            found = sum(int((~kept(batch)).sum()) for batch in source.iter_batches(BATCH_ROWS, columns=columns))
            if not found or dry_run:
                return found
            with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for batch in source.iter_batches(BATCH_ROWS):
                    if anonymise:
                        writer.write_table(anonymised(pa.Table.from_batches([batch]), viewer_ids))
                    elif (rest := batch.filter(pa.array(kept(batch)))).num_rows:
                        writer.write_batch(rest)
    except pa.ArrowInvalid as error:
        raise MalformedFileError(path, "a readable Parquet file; delete it or restore it", seen=str(error)) from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read or written: {error}; run the command again") from error
    return found


def _files(run: Path) -> Iterator[Path]:
    """Yields the run's Parquet files. Hidden files are leftovers of a killed process, which no reader uses."""
    for path in sorted(run.rglob("*.parquet")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(run).parts):
            yield path


def _rule(schema: pa.Schema, viewer_ids: NDArray[np.int64]) -> tuple[list[str], Kept] | None:
    """Returns the columns by which rows of the viewers are recognised, and how; None for a table about others."""
    if "viewer_id" in schema.names:
        return ["viewer_id"], lambda batch: rows_kept(_integers(batch["viewer_id"]), viewer_ids)
    if schema.names == ID_MAP.names:

        def not_mapped(batch: pa.RecordBatch) -> NDArray[np.bool_]:
            is_viewer = pc.equal(batch["kind"], "viewer_id").to_numpy(zero_copy_only=False)
            return np.asarray(~is_viewer | rows_kept(_integers(batch["id"]), viewer_ids))

        return ["kind", "id"], not_mapped
    if schema.names == REJECTED.names:
        texts = set(viewer_ids.tolist()) | {str(viewer) for viewer in viewer_ids.tolist()}

        def not_rejected(batch: pa.RecordBatch) -> NDArray[np.bool_]:
            rows = (json.loads(row) for row in batch["row"].to_pylist())
            return np.array([row.get("viewer_id") not in texts for row in rows], np.bool_)

        return ["row"], not_rejected
    return None


def _integers(column: pa.Array) -> NDArray[np.int64]:
    return np.asarray(column.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _correct_counts(dataset: Path) -> None:
    """Writes the present numbers of rows to ``dataset.json``, also after an erasure that was interrupted."""
    path = dataset / INFO_FILE
    if not path.exists():
        return
    info = json.loads(path.read_text())
    files = {name: dataset / f"{name}.parquet" for name in DATASET_TABLES}
    rows = {name: pq.read_metadata(file).num_rows for name, file in files.items() if file.exists()}
    if info.get("rows") != {**info.get("rows", {}), **rows}:
        write_json(path, {**info, "rows": {**info.get("rows", {}), **rows}})
