"""Logs a sample of the served features for the parity replay: the viewer's row and the videos' rows as used.

A thread writes the log, so no response waits for it. If the disk is full or too slow, samples are lost and counted, and
slates are not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Final

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.feature_names import VIDEO_DENSE
from reelway.platform.errors import StorageError
from reelway.platform.features.vector_log import SampledVectors, ServedVector
from reelway.serving.stages.arrays import Rows
from reelway.serving.video_table import VideoTable

log = logging.getLogger(__name__)

MAX_WAITING: Final = 1_000
"""Samples that may wait for the log: about 20 MB."""


class ParitySampler:
    """Writes the served features of sampled requests to the vector log.

    Args:
        thread: writes the samples, one after the other.
        max_waiting: samples that may wait for the thread; further samples are lost.
    """

    def __init__(self, vectors: SampledVectors, thread: Executor, *, max_waiting: int = MAX_WAITING) -> None:
        self._vectors = vectors
        self._thread = thread
        self._places = threading.BoundedSemaphore(max_waiting)
        self._closed = False

    def report_losses(self, on_lost: Callable[[int], None]) -> None:
        """Lets ``on_lost`` be called with the number of samples that were lost, by any thread."""
        self._vectors.on_lost = on_lost

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
        served_at_s: float,
    ) -> None:
        """Logs the request if it is in the sample.

        Args:
            videos_as_of_s: time that the release's video features describe, if the release states it. The time of an
                overlay takes precedence.
            viewer_row: the row as it was read, before values of the request were filled in.
            rows: rows of the slate.
            now_s: Unix seconds of the request, which the client may state.
            served_at_s: Unix seconds of the router's clock.
        """
        if not self._vectors.is_sampled(request_id):
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
            served_at_s=served_at_s,
        )
        self.record(vector)

    def record(self, vector: ServedVector) -> None:
        """Queues a sample and returns at once. It is lost, and counted, if too many wait or the sampler is closed."""
        if self._closed or not self._places.acquire(blocking=False):
            self._vectors.on_lost(1)
            return
        self._thread.submit(self._write, vector)

    def close(self) -> None:
        """Writes the samples that wait, and closes the log; blocks."""
        self._closed = True
        self._thread.shutdown()
        self._vectors.close()

    def _gathered(self, table: VideoTable, rows: Rows, now_s: float) -> tuple[list[list[float]], float | None]:
        """Returns the videos' features and the time of the overlay that they are from, both of one table version."""
        while True:
            live = table.live
            dense = table.gather(rows, now_s).video_dense.tolist()
            if table.live is live:  # no new version was published in between
                return dense, live.as_of_s

    def _write(self, vector: ServedVector) -> None:
        try:
            self._vectors.append(vector)
        except Exception as error:  # of any kind: the thread's result is not read
            log.warning("parity sample lost: %s", error, exc_info=not isinstance(error, StorageError))
            self._vectors.on_lost(1)
        finally:
            self._places.release()
