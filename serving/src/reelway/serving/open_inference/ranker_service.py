"""The ranker of one release with a bounded queue: load shedding, deadlines, metrics and readiness.

KServe's server has no queue limit and passes no deadline to its models, so both are here. All tensor decoding and all
inference run in worker threads. Health checks therefore answer while the ranker is busy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Final, TypeVar

from onnxruntime.capi import onnxruntime_pybind11_state as onnx_errors
from prometheus_client import CollectorRegistry

from reelway.platform.contracts.feature_names import RANKER_INPUTS
from reelway.platform.contracts.ids import short_id
from reelway.platform.contracts.manifest import RANKER_FILE
from reelway.platform.errors import DigestMismatchError, ServingError
from reelway.platform.release.folder import read_manifest
from reelway.serving.metrics import RankServerMetrics
from reelway.serving.onnx_model import OnnxModel
from reelway.serving.open_inference.errors import (
    DeadlineExceededError,
    InferenceRequestError,
    ModelNotFoundError,
    ServerBusyError,
)
from reelway.serving.open_inference.messages import MODEL
from reelway.serving.open_inference.tensors import Array, ModelSignature, TensorSpec

T = TypeVar("T")

WARM_UP_CANDIDATES: Final = 500


class LoadedRanker:
    """The ranker's ONNX model of one release. ``run`` is thread-safe.

    Args:
        folder: a release folder that ``reelway release fetch --verify`` wrote.

    Raises:
        DigestMismatchError: if the ranker's file is not the one that the manifest names.
        IncompatibleReleaseError: if the model has tensors that the protocol cannot carry.
    """

    def __init__(self, folder: Path, *, max_candidates: int) -> None:
        manifest = read_manifest(folder)
        digest = sha256((folder / RANKER_FILE).read_bytes()).hexdigest()
        expected = manifest.files[RANKER_FILE].sha256
        if digest != expected:
            raise DigestMismatchError(
                f"{folder / RANKER_FILE} has SHA-256 {digest[:12]}..., the manifest has {expected[:12]}...; "
                "fetch the release again"
            )
        self.release: str = manifest.release_id
        self._graph = OnnxModel(folder / RANKER_FILE, inputs=RANKER_INPUTS)
        inputs, outputs = (tuple(TensorSpec.of_graph(*node) for node in nodes) for nodes in self._graph.tensors())
        self.signature = ModelSignature(inputs, outputs, max_candidates)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Returns every output by its name.

        Raises:
            InferenceRequestError: if the model cannot process these values.
        """
        try:
            output = self._graph.run(inputs)
        except onnx_errors.InvalidArgument as error:  # a code beyond its table: names, types and shapes are checked
            raise InferenceRequestError(f"the ranker rejects these values: {error}") from error
        except ServingError as error:  # the warm-up had a finite output, so the request's values are the cause
            raise InferenceRequestError(f"the ranker has no finite output for these values: {error}") from error
        return {self.signature.outputs[0].name: output}


class RankerService:
    """Runs requests on a ``LoadedRanker``.

    Args:
        threads: requests that run at the same time.
        max_queued: requests that may wait for a thread; further requests are rejected.
        timeout_s: longest wait of a request without a deadline.
    """

    def __init__(
        self,
        ranker: LoadedRanker,
        registry: CollectorRegistry,
        *,
        threads: int = 1,
        max_queued: int = 32,
        timeout_s: float = 5.0,
    ) -> None:
        self.ranker = ranker
        self.release = ranker.release
        self._metrics = RankServerMetrics(registry, self.release)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ranker")
        self._max_in_flight = threads + max_queued
        self._timeout_s = timeout_s
        self._in_flight = 0
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether load balancers should send requests to this process."""
        return self._ready

    def warm_up(self) -> None:
        """Runs one request of zeros, then reports readiness."""
        rows = min(WARM_UP_CANDIDATES, self.ranker.signature.max_candidates)
        self._threads.submit(self.ranker.run, self.ranker.signature.zero_inputs(rows)).result()
        self._ready = True
        self._metrics.ready.set(1)

    def start_draining(self) -> None:
        """Reports that the process is not ready. Requests are still answered."""
        self._ready = False
        self._metrics.ready.set(0)

    def close(self) -> None:
        """Ends the worker threads. Call it after the last response."""
        self._threads.shutdown()

    def check_model(self, model: str, version: str = "") -> None:
        """Raises ModelNotFoundError if another model or another release is requested."""
        if model != MODEL:
            raise ModelNotFoundError(f"there is no model {model[:80]!r}; expected {MODEL!r}")
        if version not in ("", self.release, short_id(self.release)):
            raise ModelNotFoundError(
                f"model {MODEL!r} has no version {version[:80]!r} here; expected {short_id(self.release)}"
            )

    def record_refused(self, error: InferenceRequestError) -> None:
        """Counts a request that was rejected before ``submit``."""
        self._metrics.count(error.outcome, 0.0)

    async def submit(self, work: Callable[[LoadedRanker], tuple[int, T]], within_s: float | None = None) -> T:
        """Runs ``work`` in a worker thread. ``work`` returns the number of candidates and the response.

        Raises:
            InferenceRequestError: if the request is invalid, or was not started (see its subclasses).
        """
        started = time.monotonic()
        deadline = started + (self._timeout_s if within_s is None else min(within_s, self._timeout_s))
        outcome = "failed"
        try:
            candidates, response = await self._in_thread(work, deadline)
            self._metrics.candidates.inc(candidates)
            outcome = "ok"
            return response
        except InferenceRequestError as error:
            outcome = error.outcome
            raise
        except asyncio.CancelledError:  # the client has cancelled the call
            outcome = DeadlineExceededError.outcome
            raise
        finally:
            self._metrics.count(outcome, time.monotonic() - started)

    async def _in_thread(self, work: Callable[[LoadedRanker], T], deadline: float) -> T:
        if self._in_flight >= self._max_in_flight:
            raise ServerBusyError(
                f"{self._in_flight} requests are in flight, expected at most {self._max_in_flight}; try another replica"
            )
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, _run_before_deadline, work, self.ranker, deadline)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)


def _run_before_deadline(work: Callable[[LoadedRanker], T], ranker: LoadedRanker, deadline: float) -> T:
    if time.monotonic() >= deadline:
        raise DeadlineExceededError("the deadline passed while the request was queued")
    return work(ranker)
