"""Popular and trending videos of the last day, counted from exposures and outcomes by the log's append time.

Counts are kept for each list (all viewers, a region, a language) and video in buckets of five minutes. A window of an
hour or a day is the present bucket and the 11 or 287 before it, so it covers between five minutes less than its length
and its full length.

``E`` is the sum of outcome weights (``OUTCOME_WEIGHTS``; a watch counts if it is a long watch), ``n`` the number of
impressions, both of one video in one list and window. ``E``, ``n`` without a video are the sums over the list's videos.

- popular: ``E_day * r / r0``, with ``r0 = E_day_all / n_day_all`` and ``r = (E_day + PRIOR_IMPRESSIONS * r0) / (n_day +
  PRIOR_IMPRESSIONS)``. The count is multiplied by how readily the video was watched relative to the list's mean.
  Otherwise a video would stay popular because it is shown. The rate is shrunk towards the mean like a beta-binomial
  posterior (Efron and Morris 1975), so that a video with three impressions does not lead.
- trending: ``2 * (sqrt(x + 3/8) - sqrt(mu + 3/8))`` with ``x = E_hour`` and the expectation ``mu = s * (E_day -
  E_hour)``; ``s = (x_all + PRIOR_ENGAGEMENT) / (E_day_all - x_all + 23 * PRIOR_ENGAGEMENT)`` is the hour's share of all
  engagement. This is the z-score of a Poisson count after Anscombe's transform (1948), which has unit variance for
  small expectations too. The share ``s`` removes the time of day: a video trends if it grows more than all videos.

An outcome counts for the region and language of its viewer's latest exposure. A join by impression would have to keep
every impression of the last day. An outcome of a viewer whose exposure is not known counts for all viewers only.
"""

# Shapes: N events, R (list, video) pairs of a window

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.features.stream.recent_ids import I64, RecentIds, ViewerPlaces
from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.events import LONG_WATCH_CAP_MS, LONG_WATCH_RATIO, OUTCOME_WEIGHTS, OutcomeType
from reelway.platform.errors import MalformedFileError
from reelway.platform.eventlog import Offsets
from reelway.platform.eventlog.live_lists_file import POPULAR, TRENDING, LiveListsSnapshot, RankedIds, list_name

F64 = NDArray[np.float64]

BUCKET_US: Final = 300_000_000
HOUR_BUCKETS: Final = 12
DAY_BUCKETS: Final = 288
PRIOR_IMPRESSIONS: Final = 20.0
PRIOR_ENGAGEMENT: Final = 100.0
MIN_LIST_ENGAGEMENT: Final = 50.0
"""Engagement of a day from which on a region or language has lists of its own."""
LIST_LENGTH: Final = 500
MIN_TREND: Final = 1.0
"""Trend score, in standard deviations, from which on a video is trending."""
MAX_ROWS: Final = 20_000
"""Pairs of list and video that a bucket keeps; the pairs with the least engagement are dropped."""
MAX_LISTS: Final = 256
_VIDEO_BITS: Final = 53  # contracts.ids.MAX_ID
_DIMENSIONS: Final = ("region", "language")
_IMPRESSIONS, _ENGAGEMENT = 0, 1


class WindowCounts:
    """Impressions and engagement of each (list, video) pair in buckets of append time.

    A pair is one integer: the list's code above the video's id.
    """

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self.dropped = 0  # pairs that did not fit
        self._max_rows = max_rows
        self._buckets: dict[int, tuple[I64, F64]] = {}
        self._current = 0
        self._closed: dict[int, tuple[I64, F64]] = {}  # window length -> sum of its buckets before the current one

    def add(self, bucket: I64, pair: I64, column: int, amount: F64) -> None:
        """Adds amounts to one column of the pairs; buckets that have left the day are ignored. Shapes: ``[N]``."""
        for number in np.unique(bucket).tolist():
            if number <= self._current - DAY_BUCKETS:
                continue
            of_bucket = bucket == number
            values = np.zeros((int(of_bucket.sum()), 2))
            values[:, column] = amount[of_bucket]
            rows = _summed([self._buckets.get(number, _NOTHING), (pair[of_bucket], values)])
            self._buckets[number] = self._bounded(rows, 2 * self._max_rows)
            if number != self._current:
                self._closed.clear()

    def advance(self, bucket: int) -> None:
        """Makes ``bucket`` the current one: drops what has left the day, and bounds the buckets before it."""
        if bucket <= self._current:
            return
        self._current = bucket
        self._closed.clear()
        for number in [number for number in self._buckets if number <= bucket - DAY_BUCKETS]:
            del self._buckets[number]
        for number, rows in self._buckets.items():
            if number < bucket:
                self._buckets[number] = self._bounded(rows, self._max_rows)

    def window(self, buckets: int) -> tuple[I64, F64]:
        """Returns the pairs of the last ``buckets`` buckets, ascending, with their sums: ``[R]``, ``[R, 2]``."""
        first = self._current - buckets + 1
        if buckets not in self._closed:
            closed = [rows for number, rows in sorted(self._buckets.items()) if first <= number < self._current]
            self._closed[buckets] = _summed([_NOTHING, *closed])
        # An event may be appended after the time of the lists was read.
        present = [rows for number, rows in sorted(self._buckets.items()) if number >= self._current]
        return _summed([self._closed[buckets], *present])

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Returns all buckets, one row per pair and bucket."""
        rows = sorted(self._buckets.items())
        return {
            "bucket": np.repeat(np.array([n for n, _ in rows], np.int64), [len(pairs) for _, (pairs, _) in rows]),
            "pair": np.concatenate([_NOTHING[0], *(pairs for _, (pairs, _) in rows)]),
            "counts": np.concatenate([_NOTHING[1], *(counts for _, (_, counts) in rows)]),
            "current": np.array([self._current]),
        }

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Takes the buckets of ``to_arrays``."""
        numbers, starts = np.unique(arrays["bucket"], return_index=True)
        parts = zip(np.split(arrays["pair"], starts[1:]), np.split(arrays["counts"], starts[1:]), strict=True)
        self._buckets = dict(zip(numbers.tolist(), parts, strict=True)) if len(numbers) else {}
        self._current = int(arrays["current"][0])
        self._closed.clear()

    def _bounded(self, rows: tuple[I64, F64], limit: int) -> tuple[I64, F64]:
        pairs, counts = rows
        if len(pairs) <= limit:
            return rows
        self.dropped += len(pairs) - self._max_rows
        most = np.lexsort((counts[:, _IMPRESSIONS], counts[:, _ENGAGEMENT]))[-self._max_rows :]
        most.sort()
        return pairs[most], counts[most]


class ListWindows:
    """Popular and trending lists over exposures and outcomes.

    The caller passes each record of the logs once, in the order of its partition, and stores its offsets with the state
    (``save``). An event that was appended twice counts once, unless very many events lie between; see ``recent_ids``.
    """

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._counts = WindowCounts(max_rows)
        self.refused_values = 0  # regions and languages that found no free list
        self._names: list[str | None] = [""]  # code -> "region=eu", None if it is free; code 0 is all viewers
        self._codes = {"": 0}
        self._places = ViewerPlaces()
        self._impressions = RecentIds()
        self._outcomes = RecentIds()

    @property
    def dropped_rows(self) -> int:
        """Number of (list, video) pairs that were dropped because a bucket was full."""
        return self._counts.dropped

    def add_exposures(self, exposures: pa.Table, time_us: I64) -> int:
        """Counts rows of ``EXPOSURE_EVENT_SCHEMA``, appended at ``time_us`` ``[N]``; returns how many are new."""
        codes_N2 = np.stack([self._list_codes(name, exposures[name]) for name in _DIMENSIONS], axis=1)
        viewer = exposures["viewer_id"].to_numpy()
        if len(viewer):
            self._places.put(viewer, codes_N2)
        is_new = self._impressions.add(exposures["impression_id"].to_numpy())
        ones = np.ones(int(is_new.sum()))
        self._add(exposures["video_id"].to_numpy()[is_new], codes_N2[is_new], time_us[is_new], _IMPRESSIONS, ones)
        return len(ones)

    def add_outcomes(self, outcomes: pa.Table, time_us: I64) -> int:
        """Counts outcomes of ``OUTCOME_EVENT_SCHEMA``, appended at ``time_us`` ``[N]``; returns how many are new."""
        is_new = self._outcomes.add(outcomes["outcome_id"].to_numpy())
        weight = outcome_weights(outcomes)
        counted = is_new & (weight != 0)
        codes_N2 = self._places.get(outcomes["viewer_id"].to_numpy()[counted])
        video = outcomes["video_id"].to_numpy()[counted]
        self._add(video, codes_N2, time_us[counted], _ENGAGEMENT, weight[counted])
        return int(is_new.sum())

    def erase(self, viewer_ids: I64) -> int:
        """Forgets where viewers were. Returns how many were known. The counts of videos stay, as sums over viewers."""
        return self._places.erase(viewer_ids)

    def lists(self, as_of_us: int) -> LiveListsSnapshot:
        """Returns the lists as of a time of the log, and forgets what the day before it does not include.

        A list has at most ``LIST_LENGTH`` videos. A video without engagement is on no list, and a video below
        ``MIN_TREND`` is not trending.
        """
        self._counts.advance(as_of_us // BUCKET_US)
        pair, day = self._counts.window(DAY_BUCKETS)
        hour_pair, hour_counts = self._counts.window(HOUR_BUCKETS)
        hour = np.zeros(len(pair))
        hour[np.searchsorted(pair, hour_pair)] = np.maximum(hour_counts[:, _ENGAGEMENT], 0.0)
        code, video = pair >> _VIDEO_BITS, pair & ((1 << _VIDEO_BITS) - 1)
        lists: dict[str, RankedIds] = {}
        bounds = np.searchsorted(code, np.arange(len(self._names) + 1))
        for name, start, end in zip(self._names, bounds[:-1], bounds[1:], strict=True):
            if name is None:
                continue
            engagement = np.maximum(day[start:end, _ENGAGEMENT], 0.0)
            if name and engagement.sum() < MIN_LIST_ENGAGEMENT:
                continue
            dimension, _, value = name.partition("=")
            of_list = video[start:end]
            popular = popular_scores(engagement, day[start:end, _IMPRESSIONS])
            lists[list_name(POPULAR, dimension, value)] = _ranked(of_list, popular)
            trend = trend_scores(hour[start:end], engagement)
            lists[list_name(TRENDING, dimension, value)] = _ranked(of_list, np.where(trend >= MIN_TREND, trend, 0.0))
        if len(self._codes) == MAX_LISTS:
            self._free_codes(np.diff(bounds) == 0)
        return LiveListsSnapshot(as_of_us, lists)

    def save(self, path: Path, offsets: dict[str, Offsets]) -> None:
        """Writes the whole state with the offsets of the next records to one file, atomically."""
        arrays: dict[str, Any] = {
            "about": np.frombuffer(json.dumps([self._names, _json_offsets(offsets)]).encode(), dtype=np.uint8)
        }
        for part, values in self._parts().items():
            arrays |= {f"{part}.{name}": value for name, value in values.to_arrays().items()}
        with atomic_file(path) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **arrays)

    def restore(self, path: Path) -> dict[str, dict[int, int]]:
        """Reads the state that ``save`` wrote and returns its offsets; no offsets if the file does not exist.

        Raises:
            MalformedFileError: if ``save`` did not write the file.
        """
        if not path.exists():
            return {}
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
                names, offsets = json.loads(stored["about"].tobytes())
                for part, values in self._parts().items():
                    prefix = f"{part}."
                    values.restore({n.removeprefix(prefix): stored[n] for n in stored.files if n.startswith(prefix)})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise MalformedFileError(path, "the state of the list task; delete the file", seen=repr(error)) from error
        self._names = names
        self._codes = {name: code for code, name in enumerate(names) if name is not None}
        return {topic: {int(p): int(o) for p, o in of_topic.items()} for topic, of_topic in offsets.items()}

    def _parts(self) -> dict[str, WindowCounts | ViewerPlaces | RecentIds]:
        return {
            "counts": self._counts,
            "places": self._places,
            "impressions": self._impressions,
            "outcomes": self._outcomes,
        }

    def _add(self, video: I64, codes_N2: NDArray[np.integer[Any]], time_us: I64, column: int, amount: F64) -> None:
        """Adds the amounts to the list of all viewers, and to the lists of region and language that are known."""
        bucket = time_us // BUCKET_US
        self._counts.add(bucket, video, column, amount)
        for code in codes_N2.T.astype(np.int64):
            known = code > 0
            self._counts.add(bucket[known], (code[known] << _VIDEO_BITS) | video[known], column, amount[known])

    def _list_codes(self, dimension: str, column: pa.ChunkedArray) -> I64:
        """Returns the list code of each value; 0 if the value is null, or there are too many lists already."""
        encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
        codes = [self._code_of(f"{dimension}={value}") for value in encoded.dictionary.to_pylist()]
        index = pc.fill_null(encoded.indices, len(codes)).to_numpy(zero_copy_only=False)
        return np.asarray(np.array([*codes, 0], dtype=np.int64)[index])

    def _code_of(self, name: str) -> int:
        if name not in self._codes:
            if len(self._codes) == MAX_LISTS:
                self.refused_values += 1
                return 0
            if len(self._names) < MAX_LISTS:
                self._names.append(None)
            code = self._names.index(None)
            self._names[code], self._codes[name] = name, code
        return self._codes[name]

    def _free_codes(self, is_empty: NDArray[np.bool_]) -> None:
        """Frees the codes ``[C]`` of lists without a counted pair, so that new values do not lack one for ever."""
        codes = np.flatnonzero(is_empty[1:]) + 1
        self._places.forget(codes)
        for code in codes.tolist():
            name = self._names[code]
            if name is not None:
                del self._codes[name]
                self._names[code] = None


def outcome_weights(outcomes: pa.Table) -> F64:
    """Returns the weight of each outcome as engagement; 0 for a watch that is not long. Shapes: ``[N]``."""
    kind = pc.cast(outcomes["type"], pa.string()).combine_chunks().dictionary_encode()
    kinds = kind.dictionary.to_pylist()
    weight: F64 = np.array([OUTCOME_WEIGHTS.get(name, 0.0) for name in kinds] or [0.0])[kind.indices.to_numpy()]
    if OutcomeType.WATCH not in kinds:
        return weight
    is_watch = kind.indices.to_numpy() == kinds.index(OutcomeType.WATCH)
    duration_ms = pc.fill_null(outcomes["duration_ms"], 0).to_numpy().astype(np.float64)
    known = np.where(duration_ms > 0, duration_ms, np.inf)
    enough_ms = np.minimum(LONG_WATCH_RATIO * known, LONG_WATCH_CAP_MS)
    is_long = outcomes["value"].to_numpy() >= enough_ms
    return np.where(is_watch, np.where(is_long, OUTCOME_WEIGHTS["long_watch"], 0.0), weight)


def popular_scores(engagement: F64, impressions: F64) -> F64:
    """Returns ``E * r / r0`` of the module's docstring. Shapes: ``[R], [R] -> [R]``."""
    shown = np.maximum(impressions, engagement)  # outcomes whose exposures are not counted yet
    mean = engagement.sum() / max(shown.sum(), 1.0)
    if mean <= 0:
        return np.zeros(len(engagement))
    rate = (engagement + PRIOR_IMPRESSIONS * mean) / (shown + PRIOR_IMPRESSIONS)
    return np.asarray(engagement * rate / mean)


def trend_scores(hour: F64, day: F64) -> F64:
    """Returns the z-scores of the module's docstring from engagement. Shapes: ``[R], [R] -> [R]``."""
    before = np.maximum(day - hour, 0.0)
    share = (hour.sum() + PRIOR_ENGAGEMENT) / (before.sum() + 23 * PRIOR_ENGAGEMENT)
    score = 2.0 * (np.sqrt(hour + 0.375) - np.sqrt(share * before + 0.375))
    return np.asarray(score)


_NOTHING: Final = (np.empty(0, np.int64), np.empty((0, 2)))


def _summed(parts: list[tuple[I64, F64]]) -> tuple[I64, F64]:
    """Returns the distinct pairs, ascending, with the sums of their counts."""
    pairs = np.concatenate([pairs for pairs, _ in parts])
    if not len(pairs):
        return _NOTHING
    counts = np.concatenate([counts for _, counts in parts])
    order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    return pairs[starts], np.add.reduceat(counts[order], starts, axis=0)


def _ranked(video: I64, score: F64) -> RankedIds:
    """Returns the videos with a positive score, best first; equal scores by id."""
    best = np.argsort(-score, kind="stable")[:LIST_LENGTH]
    best = best[score[best] > 0]
    return RankedIds(video[best], score[best].astype(np.float32))


def _json_offsets(offsets: dict[str, Offsets]) -> dict[str, dict[str, int]]:
    return {topic: {str(p): offset for p, offset in of_topic.items()} for topic, of_topic in offsets.items()}
