"""An incremental copy of the catalogue topic for replays: every version of uploaded videos, without their vectors.

A compacted topic keeps the newest version of a video only, and an earlier one may have been served.
"""

# Shapes: U versions, N videos

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from reelway.pipelines.features.parity.run_files import RunFiles
from reelway.pipelines.features.views import video_content
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import VIDEOS
from reelway.platform.contracts.feature_names import VIEWS
from reelway.platform.eventlog import EventLog, Offsets
from reelway.platform.eventlog.catalogue_events import VideoUpsert, decode_upserts
from reelway.platform.eventlog.retained_records import batches_until

UPLOADS_FILE: Final = "parity/uploads.parquet"
VECTORS: Final = ("visual", "audio", "text")
UPLOAD_SCHEMA: Final = pa.schema(
    [
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("creator_id", pa.int64(), nullable=False),
        pa.field("topic", pa.int64(), nullable=False),
        pa.field("video_language", pa.string()),
        pa.field("duration_s", pa.float32(), nullable=False),
        pa.field("uploaded_at_s", pa.float64(), nullable=False),
        *(pa.field(name, pa.bool_()) for name in VECTORS),  # true, or null without the vector
        pa.field("version", pa.int64(), nullable=False),
        pa.field("digest", pa.int64(), nullable=False),
        pa.field("append_us", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class UploadVersion:
    """One version of an uploaded or updated video: the fields of ``video_content`` and when the log appended it.

    A vector is True, or None if the video has none.
    """

    content: dict[str, Any]
    append_us: int


class Uploads:
    """The known versions of uploaded and updated videos.

    Args:
        rows: versions of ``UPLOAD_SCHEMA``, in any order.
    """

    def __init__(self, rows: pa.Table) -> None:
        order = [("video_id", "ascending"), ("version", "descending"), ("digest", "descending")]
        self._rows = rows.sort_by(order).combine_chunks()
        self._ids: I64 = self._rows["video_id"].to_numpy()

    def __len__(self) -> int:
        return len(self._ids)

    def versions_of(self, video_id: int) -> Iterator[UploadVersion]:
        """Yields the versions of a video, the newest first."""
        low, high = (int(np.searchsorted(self._ids, video_id, side=side)) for side in ("left", "right"))  # type: ignore[call-overload]
        for row in self._rows.slice(low, high - low).to_pylist():
            yield UploadVersion({name: row[name] for name in VIEWS["video_content"]}, row["append_us"])

    def creators_of(self, video_ids: I64) -> I64:
        """Returns the creators that any version of the videos names."""
        return np.asarray(self._rows["creator_id"].to_numpy()[np.isin(self._ids, video_ids)], dtype=np.int64)


def copy_uploads(files: RunFiles, events: EventLog, offsets: Offsets) -> Offsets:
    """Copies the versions from ``offsets`` to the log's present end. Returns the next offsets.

    A replay that is killed may copy a version again, which changes nothing.

    Raises:
        StorageError: if the log cannot be read to its end, or a file cannot be read or written.
    """
    position = dict(offsets)
    new: list[pa.Table] = []
    for batch in batches_until(events, offsets, events.end_offsets()):
        position |= batch.next_offsets
        upserts, _ = decode_upserts(batch.records)  # the overlay writer counts those that cannot be read
        known = [(one, at.time_us) for one, at in zip(upserts, batch.records, strict=True) if one is not None]
        if known:
            new.append(_upload_rows([one for one, _ in known], [time_us for _, time_us in known]))
    if new:
        files.write_table(UPLOADS_FILE, pa.concat_tables([_copied_rows(files), *new]))
    return position


def read_uploads(files: RunFiles) -> Uploads:
    """Returns the copied versions; none without a copy."""
    return Uploads(_copied_rows(files))


def _copied_rows(files: RunFiles) -> pa.Table:
    folder, _, name = UPLOADS_FILE.rpartition("/")
    if name not in files.names(folder):
        return UPLOAD_SCHEMA.empty_table()
    return files.read_table(UPLOADS_FILE).cast(UPLOAD_SCHEMA)


def _upload_rows(upserts: Sequence[VideoUpsert], append_us: Sequence[int]) -> pa.Table:
    videos = [pa.array([getattr(upsert, field.name) for upsert in upserts], field.type) for field in VIDEOS]
    content = video_content(pa.table(videos, schema=VIDEOS))
    more = {
        **{name: pa.array([getattr(upsert, name) is not None or None for upsert in upserts]) for name in VECTORS},
        "version": pa.array([upsert.precedence[0] for upsert in upserts], pa.int64()),
        "digest": pa.array([upsert.precedence[1] for upsert in upserts], pa.int64()),
        "append_us": pa.array(append_us, pa.int64()),
    }
    columns = [more[name] if name in more else content[name] for name in UPLOAD_SCHEMA.names]
    return pa.table(columns, names=UPLOAD_SCHEMA.names).cast(UPLOAD_SCHEMA)
