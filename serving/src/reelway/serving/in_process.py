"""The whole request path in one process, called without an event loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from reelway.platform.contracts.api import RecommendRequest, RecommendResponse
from reelway.platform.features.viewer_memory import ViewerMemory
from reelway.platform.features.viewer_memory_local import LocalViewerMemory
from reelway.platform.tokens import TokenSigner
from reelway.serving.metrics import IngressMetrics
from reelway.serving.request_path import RequestPath, RouterRelease, Stages, run_without_waiting


class InProcessRecommender:
    """The whole path in one process, called without an event loop.

    Benchmarks use it as the floor, and evaluation calls it in a closed loop.

    Args:
        memory: what viewers were shown; by default a memory of this process, in the time of the requests.
    """

    def __init__(
        self,
        router_release: RouterRelease,
        stages: Stages,
        signer: TokenSigner,
        metrics: IngressMetrics | None = None,
        memory: ViewerMemory | None = None,
    ):
        self._now_s = 0.0
        self._memory = LocalViewerMemory(lambda: self._now_s) if memory is None else memory
        self._path = RequestPath(router_release, stages, signer, metrics or IngressMetrics(CollectorRegistry()))

    def recommend(
        self, request: RecommendRequest, viewer_row: Mapping[str, Any] | None, now_s: float | None = None
    ) -> RecommendResponse:
        """Returns one slate; see ``RequestPath.recommend``. ``now_s`` defaults to the clock's time."""
        self._now_s = time.time() if now_s is None else now_s
        memory = self._memory.read(request.viewer_id)
        recommendation = run_without_waiting(self._path.recommend(request, viewer_row, self._now_s, memory=memory))
        self._memory.remember_shown(request.viewer_id, recommendation.exposure.video_id, self._now_s)
        return recommendation.response
