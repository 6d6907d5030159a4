"""Feast's point-in-time join, one view at a time: what was known of each entity at each asked moment.

It adds nothing to the join and relaxes nothing: Feast picks the newest row at or before the moment, no older than
the view's TTL, and (``filter_by_created_timestamp``) none that was written later than the moment. Only the shape of
the question is chosen here, for speed: each view is asked once per distinct (entity, moment), so a viewer's row is
joined once per request and not once per impression, and the answers are spread back over the rows by position.
"""

# Shapes: N asked rows, Q distinct questions

from __future__ import annotations

import atexit
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.features import REQUEST_CONTEXT, VIEWS
from reelway.platform.errors import FeatureError

if TYPE_CHECKING:
    from feast import FeatureStore

KEYS: Final = {
    **dict.fromkeys(("viewer_profile", "viewer_activity", "viewer_history", "viewer_topic_affinity"), "viewer_id"),
    **dict.fromkeys(("video_content", "video_engagement"), "video_id"),
    "creator_statistics": "creator_key",
}
ROW: Final = "asked_row"
QUESTIONS: Final = 100_000
QUESTIONS_OF_LISTS: Final = 10_000
"""Questions per call. Feast's join carries the values of every earlier row until it has picked one; for a history of
fifty videos that is some megabytes per question of a busy viewer, so those calls are cut smaller."""


def distinct_moments(entities: I64, at_us: I64) -> tuple[I64, I64, NDArray[np.int64]]:
    """The distinct (entity, moment) pairs, sorted, and for each row the position of its pair."""
    order = np.lexsort((at_us, entities))
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (np.diff(entities[order]) != 0) | (np.diff(at_us[order]) != 0)
    pair_of = np.empty(len(order), dtype=np.int64)
    pair_of[order] = np.cumsum(first) - 1
    return entities[order][first], at_us[order][first], pair_of


def join_view(store: FeatureStore, view: str, entities: I64, at_us: I64) -> pa.Table:
    """The fields of one view for each (entity, moment), in the order asked; null where nothing was known.

    Raises:
        FeatureError: Feast cannot answer (view not registered, files missing).
    """
    asked, moments, pair_of = distinct_moments(entities, at_us)
    size = QUESTIONS_OF_LISTS if view == "viewer_history" else QUESTIONS
    parts = [
        _ask(store, [f"{view}:{name}" for name in VIEWS[view]], {KEYS[view]: asked[cut]}, moments[cut])
        for cut in (slice(start, start + size) for start in range(0, max(len(asked), 1), size))
    ]
    answers = pa.concat_tables(parts).select(VIEWS[view])
    return _plain_lists(answers.take(pa.array(pair_of)))


def join_request_context(store: FeatureStore, viewers: I64, videos: I64, at_us: I64) -> pa.Table:
    """The on-demand features of each (viewer, video, moment), computed by Feast's on-demand view.

    Raises:
        FeatureError: Feast cannot answer.
    """
    keys = {"viewer_id": viewers, "video_id": videos, "request_time_s": at_us / 1e6}
    refs = [f"request_context:{name}" for name in REQUEST_CONTEXT]
    return _ask(store, refs, keys, at_us).select(REQUEST_CONTEXT)


def _ask(store: FeatureStore, refs: Sequence[str], keys: dict[str, NDArray[Any]], at_us: I64) -> pa.Table:
    """One ``get_historical_features``; rows come back in the order asked, whatever order Feast chose."""
    import pandas as pd
    from feast.errors import FeastError

    atexit.unregister(_close_offline_engine)
    atexit.register(_close_offline_engine)
    asked = pd.DataFrame({**keys, "event_timestamp": pd.to_datetime(at_us, unit="us", utc=True)})
    asked[ROW] = np.arange(len(asked))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # raised inside ibis and Feast, not by this call
            job = store.get_historical_features(asked, features=list(refs), filter_by_created_timestamp=True)
            answers = job.to_arrow()
    except (FeastError, OSError, ValueError) as error:
        raise FeatureError(f"point-in-time join of {refs[0]}...: {type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("duckdb", "_duckdb", "ibis"):
            raise
        raise FeatureError(f"point-in-time join of {refs[0]}...: {error}") from error
    rows = answers[ROW].to_numpy()
    if not np.array_equal(np.sort(rows), np.arange(len(asked))):
        raise FeatureError(
            f"point-in-time join of {refs[0]}...: {len(rows)} answers to {len(asked)} questions, expected one each; "
            "two rows of the view have the same entity, event_timestamp and created_timestamp"
        )
    return answers.take(pa.array(np.argsort(rows)))


def _close_offline_engine() -> None:
    """Close ibis's shared DuckDB connection; left to the interpreter's end, it prints a page of warnings there."""
    import ibis

    if (engine := ibis.options.default_backend) is not None:
        ibis.options.default_backend = None
        engine.disconnect()


def _plain_lists(table: pa.Table) -> pa.Table:
    """DuckDB names the items of its lists ``l``; Arrow's own name keeps schemas comparable."""
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.list_(field.type.value_type)))
    return table
