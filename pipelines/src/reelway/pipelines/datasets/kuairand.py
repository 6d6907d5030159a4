"""Imports the published CSV files of KuaiRand (Gao et al. 2022; 1K, 27K and Pure) into the event schema.

One log row is one impression with its outcomes. KuaiRand records no slates, positions or propensities. Each row becomes
a request with position 0 and propensity 1; its source is ``random`` (random exposure) or ``standard`` (the service).
"""

# Shapes: N log rows

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.datasets.checks import CheckLimits
from reelway.pipelines.datasets.columns import (
    constant_column,
    dictionary_column,
    earliest_by_key,
    float32_column,
    time_column,
)
from reelway.pipelines.datasets.delimited import DelimitedFormat, file_line, first_uncastable, read_delimited
from reelway.platform.contracts.events import (
    CREATORS,
    IMPRESSIONS,
    OUTCOMES,
    VIDEOS,
    VIEWERS,
    Arm,
    OutcomeType,
)
from reelway.platform.errors import MalformedFileError

I64 = NDArray[np.int64]

_INT, _FLOAT, _TEXT = pa.int64(), pa.float64(), pa.string()
LOG: Final = {
    "user_id": _INT, "video_id": _INT, "time_ms": _INT, "is_like": _INT, "is_follow": _INT, "is_comment": _INT,
    "is_forward": _INT, "is_hate": _INT, "play_time_ms": _FLOAT, "duration_ms": _FLOAT, "is_rand": _INT, "tab": _INT,
}  # fmt: skip
USERS: Final = {"user_id": _INT, "user_active_degree": _TEXT, "register_days": _INT}
BASIC: Final = {
    "video_id": _INT, "author_id": _INT, "upload_dt": _TEXT, "video_duration": _FLOAT, "tag": _TEXT,
}  # fmt: skip
_USERS_FORMAT: Final = DelimitedFormat(
    USERS, ids=frozenset({"user_id"}), optional=frozenset({"user_active_degree", "register_days"})
)
_BASIC_FORMAT: Final = DelimitedFormat(
    BASIC, ids=frozenset({"video_id"}), optional=frozenset({"upload_dt", "video_duration", "tag", "author_id"})
)
_LIMITS: Final = CheckLimits()
_MAX_DAYS: Final = 36_500
_FLAGS: Final = {
    "is_like": OutcomeType.LIKE,
    "is_forward": OutcomeType.SHARE,
    "is_follow": OutcomeType.FOLLOW,
    "is_comment": OutcomeType.COMMENT,
    "is_hate": OutcomeType.NOT_INTERESTED,
}
SKIP_BELOW_MS: Final = 3_000.0
"""KuaiRand has no skip signal: a play shorter than this and than a quarter of the video counts as a skip."""
_DEFAULT_DURATION_MS: Final = 15_000.0
_DAY_US: Final = 86_400_000_000
_SOURCES: Final = ("standard", "random")
_CHINA_US: Final = 8 * 3600 * 1_000_000  # upload dates are in UTC+8


def import_kuairand(folder: Path) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """Returns the five tables of the event schema and the data set's info.

    Raises:
        MalformedFileError: if a file is missing or does not match its published format.
    """
    logs, users_path, basic_path = _paths(folder)
    log = pa.concat_tables([_read_log(path) for path in logs])
    order = pc.sort_indices(
        log, sort_keys=[("time_ms", "ascending"), ("user_id", "ascending"), ("video_id", "ascending")]
    )
    log = log.take(order)
    users = read_delimited(users_path, _USERS_FORMAT)
    basic = read_delimited(basic_path, _BASIC_FORMAT)
    timely = _timely(log)
    videos = _videos(basic_path, basic, timely)
    tables = {
        "viewers": _viewers(users, timely),
        "creators": _creators(videos),
        "videos": videos,
        "impressions": _impressions(log),
        "outcomes": _outcomes(log),
    }
    info = {"name": "kuairand", "source": f"KuaiRand, {', '.join(p.name for p in logs)}", "seed": None,
            "videos_without_events": basic.num_rows - videos.num_rows}  # fmt: skip
    return tables, info


def files_of(folder: Path) -> list[Path]:
    """Returns the files that ``import_kuairand`` reads, in a fixed order."""
    logs, users, basic = _paths(folder)
    return [*logs, users, basic]


def _paths(folder: Path) -> tuple[list[Path], Path, Path]:
    if not folder.is_dir():
        raise MalformedFileError(folder, "a folder with KuaiRand's CSV files", seen="no such folder")
    logs = sorted(folder.glob("log_*.csv"))
    users, basic = sorted(folder.glob("user_features*.csv")), sorted(folder.glob("video_features_basic*.csv"))
    for name, files in (("log_*.csv", logs), ("user_features*.csv", users), ("video_features_basic*.csv", basic)):
        if not files:
            raise MalformedFileError(folder, f"a file {name}", seen=sorted(p.name for p in folder.iterdir())[:20])
    return logs, users[0], basic[0]


def _read_log(path: Path) -> pa.Table:
    layout = DelimitedFormat(LOG, ids=frozenset({"user_id", "video_id"}))
    table = read_delimited(path, layout)
    for name in (*_FLAGS, "is_rand"):
        bad = np.flatnonzero(~np.isin(table[name].to_numpy(), (0, 1)))
        if len(bad):
            row = int(bad[0])
            line = file_line(path, layout, row)
            raise MalformedFileError(path, "0 or 1", seen=table[name][row].as_py(), row=line, column=name)
    return table


def _time_us(log: pa.Table) -> I64:
    """Returns the times of the log's rows. A time that does not fit becomes the largest, which data checks reject."""
    largest_ms = 2**62 // 1000
    time_us: I64 = log["time_ms"].to_numpy().clip(-largest_ms, largest_ms) * 1000
    return time_us


def _timely(log: pa.Table) -> pa.Table:
    """Returns the rows whose time the data checks accept. Other rows date no viewer and no video."""
    time_us = _time_us(log)
    timely = (time_us >= _LIMITS.first_time_us) & (time_us <= _LIMITS.last_time_us)
    return log.filter(pa.array(timely)) if timely.any() else log


def _viewers(users: pa.Table, log: pa.Table) -> pa.Table:
    """Returns the table ``viewers``; account age is ``register_days`` before the end of the log, if given."""
    ids, first_us = earliest_by_key(log["user_id"].to_numpy(), _time_us(log))
    users = users.filter(pc.is_in(users["user_id"], pa.array(ids)))
    viewer = users["user_id"].to_numpy()
    first_us = first_us[np.searchsorted(ids, viewer)]
    end_us = int(_time_us(log)[-1]) if log.num_rows else 0
    days = pc.fill_null(_column(users, "register_days", _INT), 0).to_numpy(zero_copy_only=False)
    since_us = end_us - np.clip(days, 0, _MAX_DAYS) * _DAY_US
    columns = {
        "viewer_id": viewer,
        "created_at": time_column(np.minimum(first_us, since_us)),
        "region": pa.nulls(len(viewer), _TEXT),
        "language": pa.nulls(len(viewer), _TEXT),
        "segment": _column(users, "user_active_degree", _TEXT),
    }
    return pa.table(columns, schema=VIEWERS)


def _videos(path: Path, basic: pa.Table, log: pa.Table) -> pa.Table:
    """Returns the videos of the log, uploaded at the start of their date, but not after their first impression."""
    ids, first_us = earliest_by_key(log["video_id"].to_numpy(), _time_us(log))
    line = np.flatnonzero(pc.is_in(basic["video_id"], pa.array(ids)).to_numpy(zero_copy_only=False))
    basic = basic.take(pa.array(line))
    video = basic["video_id"].to_numpy()
    first_us = first_us[np.searchsorted(ids, video)]
    uploaded_us = np.minimum(_dates_us(path, _column(basic, "upload_dt", _TEXT), line, first_us), first_us)
    duration = _column(basic, "video_duration", _FLOAT).to_numpy(zero_copy_only=False)
    possible = pc.less_equal(log["duration_ms"], float(_LIMITS.max_duration_ms))
    log = log.select(["video_id"]).append_column("duration_ms", pc.if_else(possible, log["duration_ms"], 0.0))
    logged = log.group_by("video_id").aggregate([("duration_ms", "max")]).sort_by("video_id")
    logged_ms = logged["duration_ms_max"].to_numpy()[np.searchsorted(logged["video_id"].to_numpy(), video)]
    duration = np.where(duration > 0, duration, np.where(logged_ms > 0, logged_ms, _DEFAULT_DURATION_MS))
    tag = pc.struct_field(pc.extract_regex(_column(basic, "tag", _TEXT), r"^\s*(?P<first>\d+)"), "first")
    topic = _topics(path, tag, line)
    rows = len(video)
    columns = {
        "video_id": video,
        "creator_id": pc.fill_null(_column(basic, "author_id", _INT), -1).to_numpy(zero_copy_only=False) + 1,
        "uploaded_at": time_column(uploaded_us),
        "duration_ms": duration.clip(1, np.iinfo(np.int32).max).astype(np.int32),
        "topic": topic,
        "language": pa.nulls(rows, _TEXT),
        "title": pa.nulls(rows, _TEXT),
        **{name: pa.nulls(rows, pa.list_(pa.float32())) for name in ("visual", "audio", "text")},
    }
    return pa.table(columns, schema=VIDEOS)


def _topics(path: Path, tag: pa.Array, line: I64) -> NDArray[np.int32]:
    try:
        topic: NDArray[np.int32] = pc.fill_null(tag.cast(pa.int32()), -1).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        row = first_uncastable(tag, pa.int32())
        expected = f"a tag of at most {np.iinfo(np.int32).max}"
        raise MalformedFileError(
            path, expected, seen=tag[row].as_py(), row=file_line(path, _BASIC_FORMAT, int(line[row])), column="tag"
        ) from None
    return topic


def _dates_us(path: Path, text: pa.Array, line: I64, missing_us: I64) -> I64:
    parsed = pc.strptime(text, format="%Y-%m-%d", unit="us", error_is_null=True)
    wrong = np.flatnonzero((parsed.is_null().to_numpy(zero_copy_only=False)) & text.is_valid().to_numpy(False))
    if len(wrong):
        row = int(wrong[0])
        at = file_line(path, _BASIC_FORMAT, int(line[row]))
        raise MalformedFileError(path, "a date like 2020-07-08", seen=text[row].as_py(), row=at, column="upload_dt")
    day_us = pc.fill_null(parsed.cast(_INT), 0).to_numpy(zero_copy_only=False) - _CHINA_US
    result_us: I64 = np.where(parsed.is_valid().to_numpy(zero_copy_only=False), day_us, missing_us)
    return result_us


def _creators(videos: pa.Table) -> pa.Table:
    """Returns the authors, numbered from 1; 0 is an unknown author. Follower counts are not published."""
    ids, first_us = earliest_by_key(videos["creator_id"].to_numpy(), videos["uploaded_at"].cast(_INT).to_numpy())
    columns = {"creator_id": ids, "created_at": time_column(first_us), "followers": np.zeros(len(ids), dtype=np.int64)}
    return pa.table(columns, schema=CREATORS)


def _impressions(log: pa.Table) -> pa.Table:
    rows = log.num_rows
    ids = np.arange(rows, dtype=np.int64)
    columns = {
        "impression_id": ids,
        "request_id": ids,
        "viewer_id": log["user_id"],
        "video_id": log["video_id"],
        "position": np.zeros(rows, dtype=np.int16),
        "event_time": time_column(_time_us(log)),
        "release": constant_column("import", rows),
        "arm": constant_column(Arm.STABLE.value, rows),
        "source": dictionary_column(log["is_rand"].to_numpy(), _SOURCES),
        "propensity": np.ones(rows, dtype=np.float32),
        "device": constant_column("unknown", rows),
    }
    return pa.table(columns, schema=IMPRESSIONS)


def _outcomes(log: pa.Table) -> pa.Table:
    """Returns a watch at its end for each row; other signals and the derived skip follow one millisecond later."""
    play_ms, duration_ms = log["play_time_ms"].to_numpy(), log["duration_ms"].to_numpy()
    kinds = [OutcomeType.WATCH, *_FLAGS.values(), OutcomeType.SKIP]
    hits = [np.arange(log.num_rows), *(np.flatnonzero(log[name].to_numpy()) for name in _FLAGS)]
    hits.append(np.flatnonzero((play_ms < SKIP_BELOW_MS) & (play_ms < 0.25 * duration_ms)))
    kind = np.repeat(np.arange(len(hits), dtype=np.int32), [len(hit) for hit in hits])
    row = np.concatenate(hits)
    end_us = _time_us(log) + 1000 + (np.clip(np.nan_to_num(play_ms), 0.0, _LIMITS.max_watch_ms) * 1000).astype(np.int64)
    at_us = end_us[row] + 1000 * (kind > 0)
    order = np.lexsort((kind, row, at_us))
    row, kind, at_us = row[order], kind[order], at_us[order]
    columns = {
        "outcome_id": np.arange(len(row), dtype=np.int64),
        "impression_id": row,
        "viewer_id": log["user_id"].to_numpy()[row],
        "video_id": log["video_id"].to_numpy()[row],
        "type": dictionary_column(kind, [k.value for k in kinds]),
        "value": float32_column(np.where(kind == 0, play_ms[row], 1.0)),
        "event_time": time_column(at_us),
    }
    return pa.table(columns, schema=OUTCOMES)


def _column(table: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    chunks = table[name].chunks
    return pa.concat_arrays(chunks) if chunks else pa.array([], kind)
