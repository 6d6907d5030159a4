"""A sample of what was served, written down for the parity replay: the viewer's row and the videos' rows as used.

It never holds up an answer: writing happens on a thread of its own, and a full disk loses samples, not slates.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.features import VIDEO_DENSE
from reelway.platform.errors import StorageError
from reelway.platform.features.vector_log import ServedVector, VectorLog
from reelway.serving.stages.arrays import Rows
from reelway.serving.video_table import VideoTable

log = logging.getLogger(__name__)


class ParitySample:
    """Offers served vectors to the log, which takes its share of them."""

    def __init__(self, vectors: VectorLog, thread: Executor) -> None:
        self._vectors = vectors
        self._thread = thread

    def offer(
        self,
        request_id: int,
        request: RecommendRequest,
        release: str,
        videos_as_of_s: float | None,
        viewer_row: Mapping[str, Any],
        table: VideoTable,
        rows: Rows,
        now_s: float,
    ) -> None:
        """Log the request if it is in the sample.

        Args:
            videos_as_of_s: the moment that the release's video features speak of, where it says so. An overlay's
                own goes before it.
            viewer_row: as it was read, before anything of the request was filled in.
            rows: of the slate.
        """
        if not self._vectors.wants(request_id):
            return
        dense, live_as_of_s = self._gathered(table, rows, now_s)
        facts = zip(
            table.video_id[rows].tolist(), table.creator_id[rows].tolist(), table.topic[rows].tolist(),
            table.uploaded_at_s[rows].tolist(), dense, strict=True,
        )  # fmt: skip
        videos = [
            {
                "video_id": video, "creator_id": creator, "topic": topic, "uploaded_at_s": uploaded_at_s,
                **dict(zip(VIDEO_DENSE, values, strict=True)),
            }
            for video, creator, topic, uploaded_at_s, values in facts
        ]  # fmt: skip
        vector = ServedVector(
            request_id=request_id,
            viewer_id=request.viewer_id,
            request_time_s=now_s,
            device=request.context.device,
            release=release,
            viewer=dict(viewer_row),
            videos=videos,
            videos_as_of_s=videos_as_of_s if live_as_of_s is None else live_as_of_s,
        )
        self._thread.submit(self._write, vector)

    def _gathered(self, table: VideoTable, rows: Rows, now_s: float) -> tuple[list[list[float]], float | None]:
        """The videos' numbers and the moment of the overlay that they are from, one version's."""
        while True:
            live = table.live
            dense = table.gather(rows, now_s).video_dense.tolist()
            if table.live is live:  # no overlay came in between
                return dense, live.as_of_s

    def _write(self, vector: ServedVector) -> None:
        try:
            self._vectors.append(vector)
        except StorageError as error:
            log.warning("a parity sample was lost: %s", error)
