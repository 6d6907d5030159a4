"""The request path's client of a rank server: arrays in, arrays out, within the request's deadline.

The deadline of a call is the remaining budget of its request. If the server is late, unreachable or rejects the call,
the client raises immediately and counts the failure by kind. The request path then falls back to retrieval's order.
gRPC retries a call once on another server if the call reached no server.

Each call names its release. A call to a server of another release therefore raises and never returns a wrong ranking.

The client uses KServe's protobuf messages with raw tensor contents, not ``kserve.InferenceGRPCClient``: that client
needs ``import kserve``, 124 MB in each Serve replica.
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

from reelway.platform.contracts.feature_names import RANKER_INPUTS
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ServingError
from reelway.serving.metrics import SHORT_RELEASE, RemoteRankerMetrics
from reelway.serving.open_inference.messages import MODEL, SERVICE, load_messages
from reelway.serving.stages.arrays import F32

MAX_TIMEOUT_S: Final = 5.0
"""A call's deadline if the request has none."""
_MESSAGE_BYTES: Final = 64 << 20
_OIP_DATATYPES: Final = {"f4": "FP32", "f8": "FP64", "i8": "INT64", "i4": "INT32", "b1": "BOOL"}
_SERVICE_CONFIG: Final = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
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
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    # A restarted server is found within a second. The default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 500),
    # A node that fails does not close its connections.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


def server_address(template: str, release: str) -> str:
    """Replaces ``{release}`` in the template by the first 12 characters of the release's id."""
    return template.replace("{release}", short_id(release))


class RemoteRanker:
    """The ``Ranker`` of one release in another process. Use it from one event loop.

    Args:
        address: ``host:port`` of gRPC. The calls are distributed over all addresses of the name.
        release: full id of the release that the server must have.

    Raises:
        ConfigError: if KServe's package is not installed.
    """

    def __init__(self, address: str, release: str, metrics: RemoteRankerMetrics) -> None:
        self._address = address
        self._release = release
        self._metrics = metrics
        self._messages: Any = load_messages()
        self._channel: Any = None  # created by the first call, because a channel belongs to an event loop
        self._names: tuple[str, ...] = ()

    async def score(self, inputs: Mapping[str, NDArray[Any]], within_s: float | None = None) -> F32:
        """See ``Ranker.score``."""
        deadline = time.monotonic() + (MAX_TIMEOUT_S if within_s is None else within_s)
        if not self._names:
            self._names = await self._fetch_input_names(deadline)
        chosen = [(name, np.ascontiguousarray(inputs[name])) for name in self._names]
        request = self._messages.ModelInferRequest(
            model_name=MODEL,
            model_version=self._release,
            inputs=[
                {"name": name, "datatype": _OIP_DATATYPES[value.dtype.str[1:]], "shape": value.shape}
                for name, value in chosen
            ],
            raw_input_contents=[value.tobytes() for _, value in chosen],
        )
        body = await self._call("ModelInfer", request.SerializeToString(), deadline)
        return self._parse_output(body, len(inputs["video_dense"]))

    async def close(self) -> None:
        """Closes the connection."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _fetch_input_names(self, deadline: float) -> tuple[str, ...]:
        """Requests the model's inputs, once. An ONNX export leaves out the inputs that its graph does not use."""
        request = self._messages.ModelMetadataRequest(name=MODEL, version=self._release)
        body = await self._call("ModelMetadata", request.SerializeToString(), deadline)
        try:
            names = tuple(tensor.name for tensor in self._messages.ModelMetadataResponse.FromString(body).inputs)
        except DecodeError as error:
            raise self._bad_answer_error(str(error)) from error
        if not names or not set(names) <= set(RANKER_INPUTS):
            raise self._bad_answer_error(f"inputs {list(names)}, expected some of {list(RANKER_INPUTS)}")
        return names

    def _parse_output(self, body: bytes, candidates: int) -> F32:
        """Raises ServingError if the response is not one row of finite numbers per candidate."""
        try:
            response = self._messages.ModelInferResponse.FromString(body)
            (tensor,), (data,) = response.outputs, response.raw_output_contents
            output: F32 = np.frombuffer(data, dtype="<f4").reshape(tensor.shape)
        except (DecodeError, ValueError) as error:
            raise self._bad_answer_error(str(error)) from error
        if tensor.datatype != "FP32" or output.ndim != 2 or len(output) != candidates:
            raise self._bad_answer_error(
                f"{tensor.datatype} of shape {list(output.shape)}, expected FP32 of {candidates} rows"
            )
        if not np.isfinite(output).all():
            raise self._bad_answer_error("values that are not finite")
        return output

    def _bad_answer_error(self, actual: str) -> ServingError:
        self._metrics.count_fault("wrong")
        return ServingError(
            f"the ranker of release {self._release[:SHORT_RELEASE]} at {self._address} answered {actual}"
        )

    async def _call(self, method: str, request: bytes, deadline: float) -> bytes:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        left_s = max(deadline - time.monotonic(), 0.001)
        try:
            response: bytes = await call(request, timeout=left_s)
        except grpc.aio.AioRpcError as error:
            raise self._translate_error(error) from error
        except asyncio.CancelledError:  # the request path has cancelled the stage
            self._metrics.count_fault("late")
            raise
        return response

    def _translate_error(self, error: grpc.aio.AioRpcError) -> Exception:
        code, ranker = error.code(), f"the ranker of release {self._release[:SHORT_RELEASE]} at {self._address}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._metrics.count_fault("late")
            return TimeoutError(f"{ranker} did not answer within the deadline")
        if code is grpc.StatusCode.UNAVAILABLE:
            self._metrics.count_fault("gone")
            return ServingError(f"{ranker} is unreachable: {error.details()}")
        self._metrics.count_fault("busy" if code is grpc.StatusCode.RESOURCE_EXHAUSTED else "refused")
        return ServingError(f"{ranker} answered {code.name}: {error.details()}")
