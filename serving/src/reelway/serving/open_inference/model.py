"""Why: one release's ranker with a queue that ends: late work is not begun, and what cannot wait is sent away at once.

Ready means that the release was verified and a first call went through; it says no again when the process is to end.
All arithmetic, and all taking apart of tensors, happens in the worker threads: health answers never wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from onnxruntime.capi import onnxruntime_pybind11_state as onnx_errors
from prometheus_client import CollectorRegistry

from reelway.platform.contracts.features import RANKER_INPUTS
from reelway.platform.contracts.manifest import RANKER_FILE
from reelway.platform.errors import ServingError
from reelway.serving.metrics import SHORT, RankServerMetrics
from reelway.serving.open_inference.refusals import (
    BusyError,
    LateError,
    NotReadyError,
    RefusedRequestError,
    UnknownModelError,
)
from reelway.serving.open_inference.tensors import Array, Signature, TensorSpec
from reelway.serving.sessions import Graph

T = TypeVar("T")

MODEL: Final = "ranker"
PLATFORM: Final = "onnxruntime_onnx"
WARM_UP_CANDIDATES: Final = 500


class LoadedRanker:
    """The graph of one release. ``run`` may be called from several threads.

    Raises:
        IncompatibleReleaseError: the graph takes or gives what the protocol cannot carry.
    """

    def __init__(self, folder: Path, *, candidates: int) -> None:
        self._graph = Graph(folder / RANKER_FILE, inputs=RANKER_INPUTS)
        inputs, outputs = (tuple(TensorSpec.of_graph(*one) for one in side) for side in self._graph.tensors())
        self.signature = Signature(inputs, outputs, candidates)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by its name.

        Raises:
            RefusedRequestError: the graph cannot work with these values.
        """
        try:
            output = self._graph.run(inputs)
        except onnx_errors.InvalidArgument as error:  # a code beyond its table: shapes and types are checked before
            raise RefusedRequestError(f"the graph refuses these values: {error}") from error
        except ServingError as error:  # it gave finite numbers when it was warmed up
            raise RefusedRequestError(f"no finite answer for these values: {error}") from error
        return {self.signature.outputs[0].name: output}


class ServedRanker:
    """What both protocols answer from.

    Args:
        release: full id; it is the model's version.
        threads: requests that are worked out at the same time.
        waiting: requests that may wait for that; more are sent away.
        timeout_s: how long a request without a deadline may wait.
    """

    def __init__(
        self, release: str, registry: CollectorRegistry, *, threads: int = 1, waiting: int = 32, timeout_s: float = 5.0
    ) -> None:
        self.release = release
        self.registry = registry
        self._metrics = RankServerMetrics(registry, release)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ranker")
        self._room = threads + waiting
        self._timeout_s = timeout_s
        self._under_way = 0
        self._loaded: LoadedRanker | None = None
        self._ending = False

    @property
    def ready(self) -> bool:
        """Whether requests should come here."""
        return self._loaded is not None and not self._ending

    async def begin(self, loaded: LoadedRanker) -> None:
        """Make a first call, as a request would, and be ready."""
        rows = min(WARM_UP_CANDIDATES, loaded.signature.candidates)
        nothing = loaded.signature.nothing(rows)
        await asyncio.get_running_loop().run_in_executor(self._threads, loaded.run, nothing)
        self._loaded = loaded
        self._metrics.ready.set(1)

    def end(self) -> None:
        """Be ready no longer; requests that still come are answered."""
        self._ending = True
        self._metrics.ready.set(0)

    def close(self) -> None:
        """After the last answer."""
        self._threads.shutdown()

    def knows(self, model: str, version: str = "") -> None:
        """Raises UnknownModelError: it is not the model, or not the release, that is served here."""
        if model != MODEL:
            raise UnknownModelError(f"there is no model {model[:80]!r}; expected {MODEL!r}")
        if version not in ("", self.release, self.release[:SHORT]):
            raise UnknownModelError(
                f"model {MODEL!r} has no version {version[:80]!r} here; expected {self.release[:SHORT]}"
            )

    def count_refused(self, refusal: RefusedRequestError) -> None:
        """Add a request that ``answer`` never saw."""
        self._metrics.count(refusal.outcome, 0.0)

    @property
    def loaded(self) -> LoadedRanker:
        """Raises NotReadyError: it is being fetched, verified or warmed up."""
        if self._loaded is None:
            raise NotReadyError(f"release {self.release[:SHORT]} is being loaded; try again")
        return self._loaded

    async def answer(self, work: Callable[[LoadedRanker], tuple[int, T]], within_s: float | None = None) -> T:
        """Have ``work`` done in a worker thread and count it; it returns the number of candidates and the answer.

        Raises:
            RefusedRequestError: the request is wrong, or was not begun; see its subclasses.
        """
        begun = time.monotonic()
        deadline = begun + (self._timeout_s if within_s is None else min(within_s, self._timeout_s))
        outcome = "failed"
        try:
            loaded = self.loaded
            if self._under_way >= self._room:
                raise BusyError(f"{self._under_way} requests are under way, expected at most {self._room}; try another")
            self._under_way += 1
            self._metrics.under_way.set(self._under_way)
            try:
                loop = asyncio.get_running_loop()
                candidates, answer = await loop.run_in_executor(self._threads, _in_time, work, loaded, deadline)
            finally:
                self._under_way -= 1
                self._metrics.under_way.set(self._under_way)
            self._metrics.candidates.inc(candidates)
            outcome = "ok"
            return answer
        except RefusedRequestError as refusal:
            outcome = refusal.outcome
            raise
        except asyncio.CancelledError:  # nobody waits for it any more
            outcome = LateError.outcome
            raise
        finally:
            self._metrics.count(outcome, time.monotonic() - begun)


def _in_time(work: Callable[[LoadedRanker], T], loaded: LoadedRanker, deadline: float) -> T:
    if time.monotonic() >= deadline:
        raise LateError("its deadline passed while it waited for its turn")
    return work(loaded)
