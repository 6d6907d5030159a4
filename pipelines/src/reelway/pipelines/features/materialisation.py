"""Fills the online store with every viewer's row as of a given time.

The rows come from the same point-in-time join as training rows, so TTL and creation time also apply online. Feast's own
``materialize`` takes the newest row, whenever it was written. All fields of all viewers are written, with null for
unknown values. So materialising again (also after a correction) leaves exactly the rows of that time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from reelway.pipelines.features.follows import restore_follows
from reelway.pipelines.features.training_rows import viewer_snapshot
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.feature_names import VIEWER_VIEWS, VIEWS
from reelway.platform.errors import FeatureError
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_memory import open_viewer_memory
from reelway.platform.features.viewer_row_erasure import delete_old_viewer_rows
from reelway.platform.retention import retention

if TYPE_CHECKING:
    from feast import FeatureStore

MATERIALISATION_FILE: Final = "online.json"
WRITE_BATCH_ROWS: Final = 500

Report = Callable[[int, int], None]
"""Called with the number of written rows and the total."""


def _silent(_done: int, _total: int) -> None:
    return None


def materialise(features_dir: Path, at_s: float, report: Report = _silent) -> int:
    """Writes every known viewer's row as of ``at_s`` (Unix seconds) to the online store. Returns the number of viewers.

    The creators that the viewers follow are written into the viewers' memory.

    Raises:
        FeatureError: if the views are not built, or the online store cannot be written.
        StorageError: if the viewers' memory cannot be written.
    """
    store = open_feature_store(features_dir)
    profiles = features_dir / "views" / "viewer_profile"
    if not profiles.exists():
        raise FeatureError(f"{profiles}: not found; run `reelway features --run {features_dir.parent}` first")
    viewers = pq.read_table(profiles, columns=["viewer_id"])["viewer_id"].unique().sort()
    snapshot = viewer_snapshot(features_dir, viewers.to_numpy(), at_s)
    total, done = snapshot.num_rows * len(VIEWER_VIEWS), 0
    for view in VIEWER_VIEWS:
        for start in range(0, snapshot.num_rows, WRITE_BATCH_ROWS):
            part = snapshot.slice(start, WRITE_BATCH_ROWS)
            done += write_rows(store, view, part, [datetime.fromtimestamp(at_s, UTC)] * part.num_rows)
            report(done, total)
    delete_old_viewer_rows(store, datetime.fromtimestamp(at_s, UTC) - timedelta(days=retention().online_row_days))
    restore_follows(open_viewer_memory(store), features_dir, at_s)
    write_json(features_dir / MATERIALISATION_FILE, {"at_s": at_s, "viewers": snapshot.num_rows})
    return int(snapshot.num_rows)


def materialised_at_s(features_dir: Path) -> float | None:
    """Returns the time of the online store's rows, or None if the store was never filled."""
    try:
        return float(json.loads((features_dir / MATERIALISATION_FILE).read_text())["at_s"])
    except FileNotFoundError:
        return None


def write_rows(store: FeatureStore, view: str, rows: pa.Table, at: Sequence[datetime]) -> int:
    """Writes rows of a viewer view, each with its own time. Returns the number of rows.

    Raises:
        FeatureError: if the online store cannot be written.
    """
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    registered = store.get_feature_view(view)
    types = {field.name: field.dtype.to_value_type() for field in registered.features}
    columns = {name: _protos(rows[name], types[name]) for name in VIEWS[view]}
    batch = [
        (
            EntityKey(join_keys=["viewer_id"], entity_values=[Value(int64_val=viewer)]),
            {name: values[i] for name, values in columns.items()},
            at[i],
            at[i],
        )
        for i, viewer in enumerate(rows["viewer_id"].to_pylist())
    ]
    try:
        store._get_provider().online_write_batch(store.config, registered, batch, None)
    except Exception as error:  # Feast does not wrap the errors of its online store's client
        raise FeatureError(f"online store: cannot write {view}: {type(error).__name__}: {error}") from error
    return len(batch)


def _protos(column: pa.ChunkedArray, value_type: Any) -> list[Any]:
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import python_values_to_proto_values

    values = column.to_pylist()
    present = iter(python_values_to_proto_values([value for value in values if value is not None], value_type))
    return [Value() if value is None else next(present) for value in values]
