"""A release's ranker as its graph sees it when KServe runs it: arrays out, arrays back, and never a wait without end.

A call has what is left of the request's budget as its deadline. Late, gone or refused is an exception at once, counted
by kind; the graph then takes the next rung of its ladder. A call that never reached a server is tried once more, which
is how a server that ends is left for another one. Asking for the release by its id means that an address which leads to
another release's server gives no answer, and not a wrong one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from reelway.platform.contracts.features import RANKER_INPUTS
from reelway.platform.errors import ServingError
from reelway.serving.metrics import SHORT, RemoteRankerMetrics
from reelway.serving.open_inference import messages
from reelway.serving.open_inference.model import MODEL
from reelway.serving.stages.arrays import F32

LONGEST_S: Final = 5.0
"""A call's deadline where the request has none."""
_MESSAGE_BYTES: Final = 64 << 20
_ONNX_KINDS: Final = {"f4": "FP32", "f8": "FP64", "i8": "INT64", "i4": "INT32", "b1": "BOOL"}
_RETRY: Final = {
    "methodConfig": [
        {
            "name": [{"service": messages.SERVICE}],
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.005s",
                "maxBackoff": "0.02s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "loadBalancingConfig": [{"round_robin": {}}],
}
_OPTIONS: Final = (
    ("grpc.service_config", json.dumps(_RETRY)),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    # A server that comes back is found within a second; the default grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 500),
    # A node that vanished sends no end of its connections.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


def address_of(template: str, release: str) -> str:
    """Where a release's server is: ``{release}`` in the template is the first characters of its id."""
    return template.replace("{release}", release[:SHORT])


class RankerThere:
    """The ``Ranker`` of one release in another process. Used from one event loop.

    Args:
        address: ``host:port`` of gRPC; a name with several addresses is asked in turns.
        release: full id; the server must have this one.
    """

    def __init__(self, address: str, release: str, metrics: RemoteRankerMetrics) -> None:
        self._address = address
        self._release = release
        self._metrics = metrics
        self._channel: Any = None  # made where it is used: a channel belongs to an event loop
        self._names: tuple[str, ...] = ()

    async def score(self, inputs: Mapping[str, NDArray[Any]], within_s: float | None = None) -> F32:
        """See ``Ranker.score``."""
        deadline = time.monotonic() + (LONGEST_S if within_s is None else within_s)
        if not self._names:
            self._names = await self._inputs_of_graph(deadline)
        chosen = [(name, np.ascontiguousarray(inputs[name])) for name in self._names]
        request = messages.ModelInferRequest(
            model_name=MODEL,
            model_version=self._release,
            inputs=[
                {"name": name, "datatype": _ONNX_KINDS[value.dtype.str[1:]], "shape": value.shape}
                for name, value in chosen
            ],
            raw_input_contents=[value.tobytes() for _, value in chosen],
        )
        answer = await self._call("ModelInfer", request.SerializeToString(), deadline)
        return self._read(answer, len(inputs["video_dense"]))

    async def close(self) -> None:
        """Give up the connection."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _inputs_of_graph(self, deadline: float) -> tuple[str, ...]:
        """An export leaves out what its graph does not use, so the server is asked, once."""
        request = messages.ModelMetadataRequest(name=MODEL, version=self._release)
        body = await self._call("ModelMetadata", request.SerializeToString(), deadline)
        try:
            names = tuple(tensor.name for tensor in messages.ModelMetadataResponse.FromString(body).inputs)
        except DecodeError as error:
            raise self._wrong(str(error)) from error
        if not names or not set(names) <= set(RANKER_INPUTS):
            raise self._wrong(f"that it takes {list(names)}, expected some of {list(RANKER_INPUTS)}")
        return names

    def _read(self, body: bytes, candidates: int) -> F32:
        """Raises ServingError: it is not one row of numbers for each candidate, so nothing may be ordered by it."""
        try:
            answer = messages.ModelInferResponse.FromString(body)
            (tensor,), (data,) = answer.outputs, answer.raw_output_contents
            output: F32 = np.frombuffer(data, dtype="<f4").reshape(tensor.shape)
        except (DecodeError, ValueError) as error:
            raise self._wrong(str(error)) from error
        if tensor.datatype != "FP32" or output.ndim != 2 or len(output) != candidates:
            raise self._wrong(f"{tensor.datatype} of shape {list(output.shape)}, expected FP32 of {candidates} rows")
        if not np.isfinite(output).all():
            raise self._wrong("values that are not finite")
        return output

    def _wrong(self, seen: str) -> ServingError:
        self._metrics.count_fault("wrong")
        return ServingError(f"the ranker of release {self._release[:SHORT]} at {self._address} answered {seen}")

    async def _call(self, method: str, request: bytes, deadline: float) -> bytes:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        call = self._channel.unary_unary(f"/{messages.SERVICE}/{method}")
        left_s = max(deadline - time.monotonic(), 0.001)
        try:
            answer: bytes = await call(request, timeout=left_s)
        except grpc.aio.AioRpcError as fault:
            raise self._counted(fault) from fault
        except asyncio.CancelledError:  # whoever asked has given up
            self._metrics.count_fault("late")
            raise
        return answer

    def _counted(self, fault: grpc.aio.AioRpcError) -> Exception:
        code, what = fault.code(), f"the ranker of release {self._release[:SHORT]} at {self._address}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._metrics.count_fault("late")
            return TimeoutError(f"{what} is late")
        if code is grpc.StatusCode.UNAVAILABLE:
            self._metrics.count_fault("gone")
            return ServingError(f"{what} is gone: {fault.details()}")
        self._metrics.count_fault("busy" if code is grpc.StatusCode.RESOURCE_EXHAUSTED else "refused")
        return ServingError(f"{what} answered {code.name}: {fault.details()}")
