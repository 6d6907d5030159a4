"""Converts ratings to events: a rating is a watched impression, with a like or a not_interested.

- A rating means that the user saw the movie, so its watch has the full nominal duration. Movie lengths are not used.
- Outcomes follow their impression by ``OUTCOME_DELAY_US``, so that no feature at the impression's second contains its
  outcome. MovieLens stamps many ratings of one user with the same second.
- Up to ``MAX_SESSION_RATINGS`` successive ratings of one session are one request. A recommender has the ratings
  before a page, not those on it, so a model must not learn from the latter.
- Properties that the source lacks (creator, device, position) are constants.
"""

# Shapes: N ratings

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.datasets.columns import constant_column, dictionary_column, earliest_by_key, time_column
from reelway.platform.contracts.events import CREATORS, IMPRESSIONS, OUTCOMES, VIDEOS, VIEWERS, Arm, OutcomeType

I64 = NDArray[np.int64]

NOMINAL_DURATION_MS: Final = 30_000
OUTCOME_DELAY_US: Final = 1_000_000
MAX_SESSION_RATINGS: Final = 20
SESSION_GAP_US: Final = 3_600_000_000
"""A longer pause between two ratings of a viewer starts another request."""
LIKE_FROM: Final = 4.0
NOT_INTERESTED_TO: Final = 1.0
UNKNOWN_CREATOR: Final = 0
IMPORTED: Final = "import"
_TYPES: Final = (OutcomeType.WATCH, OutcomeType.LIKE, OutcomeType.NOT_INTERESTED)


@dataclass(frozen=True)
class Ratings:
    """Ratings by viewer and time, ``[N]`` each."""

    viewer_id: I64
    video_id: I64
    rating: NDArray[np.float64]
    time_us: I64


@dataclass(frozen=True)
class Users:
    """Known viewers; all columns are as long as ``viewer_id``."""

    viewer_id: I64
    region: pa.Array
    segment: pa.Array


@dataclass(frozen=True)
class Movies:
    """Known videos; all columns are as long as ``video_id``."""

    video_id: I64
    topic: NDArray[np.int32]
    title: pa.Array
    text: pa.Array


def ratings_to_tables(
    ratings: Ratings, people: Users | None, films: Movies
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """Returns the five tables, and counts of the users and movies without ratings, which are left out.

    Impression ids are the rank of the rating by time, viewer and video, so the same file gives the same ids.
    """
    order = np.lexsort((ratings.video_id, ratings.viewer_id, ratings.time_us))
    sorted_ratings = Ratings(
        ratings.viewer_id[order], ratings.video_id[order], ratings.rating[order], ratings.time_us[order]
    )
    viewers, silent_viewers = _viewers(sorted_ratings, people)
    videos, unrated = _videos(sorted_ratings, films)
    start_us = sorted_ratings.time_us[:1]
    creators = {
        "creator_id": pa.array([UNKNOWN_CREATOR] * len(start_us), pa.int64()),
        "created_at": time_column(start_us),
        "followers": pa.array([0] * len(start_us), pa.int64()),
    }
    tables = {
        "viewers": viewers,
        "creators": pa.table(creators, schema=CREATORS),
        "videos": videos,
        "impressions": _impressions(sorted_ratings),
        "outcomes": _outcomes(sorted_ratings),
    }
    return tables, {"viewers_without_events": silent_viewers, "videos_without_events": unrated}


def _known(entity: I64, ratings_entity: I64, time_us: I64) -> tuple[NDArray[np.bool_], I64]:
    """Returns a mask of the entities with events, and the first time of each of these."""
    ids, first_us = earliest_by_key(ratings_entity, time_us)
    slot = np.minimum(np.searchsorted(ids, entity), max(len(ids) - 1, 0))
    known = ids[slot] == entity if len(ids) else np.zeros(len(entity), dtype=np.bool_)
    return known, first_us[slot[known]]


def _viewers(ratings: Ratings, people: Users | None) -> tuple[pa.Table, int]:
    if people is None:
        ids, first_us = earliest_by_key(ratings.viewer_id, ratings.time_us)
        nothing = pa.nulls(len(ids), pa.string())
        people, known = Users(ids, nothing, nothing), np.ones(len(ids), dtype=np.bool_)
    else:
        known, first_us = _known(people.viewer_id, ratings.viewer_id, ratings.time_us)
    keep = pa.array(known)
    columns: Mapping[str, Any] = {
        "viewer_id": people.viewer_id[known],
        "created_at": time_column(first_us),
        "region": people.region.filter(keep),
        "language": pa.nulls(len(first_us), pa.string()),
        "segment": people.segment.filter(keep),
    }
    return pa.table(columns, schema=VIEWERS), int((~known).sum())


def _videos(ratings: Ratings, films: Movies) -> tuple[pa.Table, int]:
    known, first_us = _known(films.video_id, ratings.video_id, ratings.time_us)
    keep, rows = pa.array(known), len(first_us)
    columns = {
        "video_id": films.video_id[known],
        "creator_id": np.full(rows, UNKNOWN_CREATOR, dtype=np.int64),
        "uploaded_at": time_column(first_us),  # first rating: the earliest time at which the movie is known to exist
        "duration_ms": np.full(rows, NOMINAL_DURATION_MS, dtype=np.int32),
        "topic": films.topic[known],
        "language": pa.nulls(rows, pa.string()),
        "title": films.title.filter(keep),
        "visual": pa.nulls(rows, pa.list_(pa.float32())),
        "audio": pa.nulls(rows, pa.list_(pa.float32())),
        "text": films.text.filter(keep),
    }
    return pa.table(columns, schema=VIDEOS), int((~known).sum())


def session_starts(viewer_id: I64, time_us: I64) -> I64:
    """Returns the first row of each row's request.

    A request holds at most ``MAX_SESSION_RATINGS`` successive rows of one viewer without a pause of more than
    ``SESSION_GAP_US``. Rows ascend in time.
    """
    rows = np.arange(len(viewer_id), dtype=np.int64)
    if not len(rows):
        return rows
    order = np.argsort(viewer_id, kind="stable")
    viewer, when_us = viewer_id[order], time_us[order]
    begins = np.ones(len(rows), dtype=np.bool_)
    begins[1:] = (viewer[1:] != viewer[:-1]) | (np.diff(when_us) > SESSION_GAP_US)
    since = rows - np.maximum.accumulate(np.where(begins, rows, 0))
    begins |= since % MAX_SESSION_RATINGS == 0
    request = np.empty(len(rows), dtype=np.int64)
    request[order] = order[np.maximum.accumulate(np.where(begins, rows, 0))]
    return request


def _impressions(ratings: Ratings) -> pa.Table:
    rows = len(ratings.time_us)
    ids = np.arange(rows, dtype=np.int64)
    columns = {
        "impression_id": ids,
        "request_id": session_starts(ratings.viewer_id, ratings.time_us),
        "viewer_id": ratings.viewer_id,
        "video_id": ratings.video_id,
        "position": np.zeros(rows, dtype=np.int16),
        "event_time": time_column(ratings.time_us),
        "release": constant_column(IMPORTED, rows),
        "arm": constant_column(Arm.STABLE.value, rows),
        "source": constant_column(IMPORTED, rows),
        "propensity": np.ones(rows, dtype=np.float32),
        "device": constant_column("unknown", rows),
    }
    return pa.table(columns, schema=IMPRESSIONS)


def _outcomes(ratings: Ratings) -> pa.Table:
    hits = (
        np.arange(len(ratings.rating)),
        np.flatnonzero(ratings.rating >= LIKE_FROM),
        np.flatnonzero(ratings.rating <= NOT_INTERESTED_TO),
    )
    row = np.concatenate(hits)
    kind = np.repeat(np.arange(len(hits), dtype=np.int32), [len(hit) for hit in hits])
    order = np.lexsort((kind, row))  # ratings ascend in time, and all outcomes have the same delay
    row, kind = row[order], kind[order]
    columns = {
        "outcome_id": np.arange(len(row), dtype=np.int64),
        "impression_id": row,
        "viewer_id": ratings.viewer_id[row],
        "video_id": ratings.video_id[row],
        "type": dictionary_column(kind, [t.value for t in _TYPES]),
        "value": np.where(kind == 0, NOMINAL_DURATION_MS, 1).astype(np.float32),
        "event_time": time_column(ratings.time_us[row] + OUTCOME_DELAY_US),
    }
    return pa.table(columns, schema=OUTCOMES)
