"""Feast's point-in-time join, one view per call: the features of each entity known at a given time.

Feast picks the newest row at or before the time, no older than the view's TTL. With ``filter_by_created_timestamp`` it
also skips rows written after the time. This module changes only how entity rows are passed, for speed: each call
contains distinct (entity, time) pairs. So a viewer's row is joined once per request, not once per impression, and the
results are copied back to all rows.
"""

# Shapes: N requested rows, Q distinct entity rows

from __future__ import annotations

import atexit
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.feature_names import REQUEST_CONTEXT, VIEWS
from reelway.platform.errors import FeatureError

if TYPE_CHECKING:
    from feast import FeatureStore

KEYS: Final = {
    **dict.fromkeys(("viewer_profile", "viewer_activity", "viewer_history", "viewer_topic_affinity"), "viewer_id"),
    **dict.fromkeys(("video_content", "video_engagement"), "video_id"),
    "creator_statistics": "creator_key",
}
ROW_ID_COLUMN: Final = "asked_row"
MAX_ENTITY_ROWS: Final = 100_000
MAX_ENTITY_ROWS_FOR_LISTS: Final = 10_000
"""Maximum entity rows per call. Feast's join carries the values of all earlier rows until it has picked one. For a
history of fifty videos these are some megabytes per entity row of an active viewer, so such calls are smaller.
"""


def distinct_entity_rows(entities: I64, at_us: I64) -> tuple[I64, I64, NDArray[np.int64]]:
    """Returns the distinct (entity, time) pairs, sorted, and for each row the index of its pair."""
    order = np.lexsort((at_us, entities))
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (np.diff(entities[order]) != 0) | (np.diff(at_us[order]) != 0)
    pair_of = np.empty(len(order), dtype=np.int64)
    pair_of[order] = np.cumsum(first) - 1
    return entities[order][first], at_us[order][first], pair_of


def join_view(store: FeatureStore, view: str, entities: I64, at_us: I64) -> pa.Table:
    """Returns the fields of one view for each (entity, time), in the given order; null if no row was known.

    Raises:
        FeatureError: if Feast fails, for example because the view is not registered or files are missing.
    """
    distinct, moments, pair_of = distinct_entity_rows(entities, at_us)
    size = MAX_ENTITY_ROWS_FOR_LISTS if view == "viewer_history" else MAX_ENTITY_ROWS
    parts = [
        _historical_features(
            store, [f"{view}:{name}" for name in VIEWS[view]], {KEYS[view]: distinct[cut]}, moments[cut]
        )
        for cut in (slice(start, start + size) for start in range(0, max(len(distinct), 1), size))
    ]
    answers = pa.concat_tables(parts).select(VIEWS[view])
    return _plain_lists(answers.take(pa.array(pair_of)))


def join_request_context(store: FeatureStore, viewers: I64, videos: I64, at_us: I64) -> pa.Table:
    """Returns the on-demand features of each (viewer, video, time), computed by Feast's on-demand view.

    Raises:
        FeatureError: if Feast fails.
    """
    keys = {"viewer_id": viewers, "video_id": videos, "request_time_s": at_us / 1e6}
    refs = [f"request_context:{name}" for name in REQUEST_CONTEXT]
    return _historical_features(store, refs, keys, at_us).select(REQUEST_CONTEXT)


def _historical_features(
    store: FeatureStore, refs: Sequence[str], keys: dict[str, NDArray[Any]], at_us: I64
) -> pa.Table:
    """Calls ``get_historical_features`` and restores the given row order, which Feast does not keep."""
    import pandas as pd
    from feast.errors import FeastError

    atexit.unregister(_close_offline_engine)
    atexit.register(_close_offline_engine)
    entity_rows = pd.DataFrame({**keys, "event_timestamp": pd.to_datetime(at_us, unit="us", utc=True)})
    entity_rows[ROW_ID_COLUMN] = np.arange(len(entity_rows))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ibis and Feast raise them internally
            job = store.get_historical_features(entity_rows, features=list(refs), filter_by_created_timestamp=True)
            answers = job.to_arrow()
    except (FeastError, OSError, ValueError) as error:
        raise FeatureError(f"point-in-time join of {refs[0]}...: {type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("duckdb", "_duckdb", "ibis"):
            raise
        raise FeatureError(f"point-in-time join of {refs[0]}...: {error}") from error
    rows = answers[ROW_ID_COLUMN].to_numpy()
    if not np.array_equal(np.sort(rows), np.arange(len(entity_rows))):
        raise FeatureError(
            f"point-in-time join of {refs[0]}...: {len(rows)} rows for {len(entity_rows)} entity rows; "
            "remove rows of the view with equal entity, event_timestamp and created_timestamp"
        )
    return answers.take(pa.array(np.argsort(rows)))


def _close_offline_engine() -> None:
    """Closes ibis's shared DuckDB connection. Otherwise it prints many warnings when the interpreter exits."""
    import ibis

    if (engine := ibis.options.default_backend) is not None:
        ibis.options.default_backend = None
        engine.disconnect()


def _plain_lists(table: pa.Table) -> pa.Table:
    """Renames the list items, which DuckDB calls ``l``, to Arrow's default name, so that schemas are comparable."""
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.list_(field.type.value_type)))
    return table
