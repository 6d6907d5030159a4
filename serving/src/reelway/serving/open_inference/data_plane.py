"""KServe's data plane, with strict decoding, the release as model version, and readiness that ends before the server.

What KServe's own lacks, and is therefore overridden:

- ``decode`` raises ``KeyError`` or ``ValueError`` for a malformed request, which KServe answers with 500. Here the
  request is the client's error.
- ``decode`` ignores bytes after the last tensor, and converts binary tensors to lists. ``_decode_binary`` does not.
- ``ready`` and ``model_ready`` stay true until the server has stopped. Here they turn false when draining starts.
- Metadata name no version.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

import orjson
from kserve import InferInput, InferRequest, ModelRepository
from kserve.constants.constants import PredictorProtocol
from kserve.errors import InvalidInput
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.model_repository_extension import ModelRepositoryExtension

from reelway.serving.open_inference.errors import InferenceRequestError
from reelway.serving.open_inference.ranker_service import RankerService

NAME: Final = "reelway-rank-server"
EXTENSIONS: Final = ("binary_tensor_data",)
PLATFORM: Final = "onnxruntime_onnx"
LENGTH_HEADER: Final = "inference-header-content-length"


class RankerDataPlane(DataPlane):
    """See the module."""

    def __init__(self, registry: ModelRepository, service: RankerService) -> None:
        super().__init__(registry)
        self._service = service

    def metadata(self) -> dict[str, Any]:
        return {"name": NAME, "version": version("reelway-serving"), "extensions": list(EXTENSIONS)}

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        described = await super().model_metadata(model_name)
        return {**described, "platform": PLATFORM, "versions": [self._service.release]}

    async def ready(self) -> bool:
        return self._service.ready

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether the model is ready.

        Args:
            model_name: name of the model.
            disable_predictor_health_check: set by KServe for an inference request, which is answered while draining.
        """
        ready = await super().model_ready(model_name, disable_predictor_health_check)
        return bool(ready) and (disable_predictor_health_check or self._service.ready)

    def decode(
        self, body: Any, headers: dict[str, str], protocol_version: str = "v1", model_name: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        try:
            if protocol_version != PredictorProtocol.REST_V2.value:
                raise InferenceRequestError("the request is not of protocol v2; send it to /v2/models/ranker/infer")
            if isinstance(body, bytes):
                return _decode_binary(body, headers.get(LENGTH_HEADER), model_name), {}
            decoded: tuple[Any, dict[str, Any]] = super().decode(body, headers, protocol_version, model_name)
            return decoded
        except InferenceRequestError as error:
            self._service.record_refused(error)
            raise
        except (InvalidInput, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            malformed = InferenceRequestError(f"the request is malformed: {type(error).__name__}: {str(error)[:200]}")
            self._service.record_refused(malformed)
            raise malformed from error

    def encode(
        self,
        model_name: str,
        response: Any,
        headers: dict[str, str],  # noqa: ARG002
        req_attributes: dict[str, Any],
    ) -> tuple[Any, dict[str, str]]:
        """Encodes the response. The request's headers are left out: they could ask for a CloudEvent."""
        encoded: tuple[Any, dict[str, str]] = super().encode(model_name, response, {}, req_attributes)
        return encoded


class ReadOnlyRepository(ModelRepositoryExtension):
    """Rejects ``load`` and ``unload``. Without it any client can unload the model."""

    async def load(self, model_name: str) -> None:
        raise NotImplementedError(f"model {model_name!r} cannot be loaded: the model of a server never changes")

    async def unload(self, model_name: str) -> None:
        raise NotImplementedError(f"model {model_name!r} cannot be unloaded: the model of a server never changes")


def _decode_binary(body: bytes, json_length: str | None, model_name: str | None) -> InferRequest:
    """Returns the request whose tensors follow its JSON as bytes. The tensors are decoded later, in a worker thread.

    ``InferRequest.from_bytes`` converts each tensor to a list in the event loop, which is 30 ms for 500 candidates.
    """
    if json_length is None or not json_length.isascii() or not json_length.isdigit() or len(json_length) > 12:
        raise InferenceRequestError(f"{LENGTH_HEADER} is {str(json_length)[:40]!r}, expected a number of bytes")
    start = int(json_length)
    if start > len(body):
        raise InferenceRequestError(f"{LENGTH_HEADER} is {start}, expected at most the body's {len(body)} bytes")
    try:
        request = orjson.loads(body[:start])
    except orjson.JSONDecodeError as error:
        raise InferenceRequestError(f"the request is not JSON: {error}") from error
    inputs, contents = [], list[bytes | None]()
    for tensor in request["inputs"]:
        name, data = tensor["name"], tensor.get("data")
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        if (size is None) == (data is None):
            raise InferenceRequestError(f"input {name!r:.80} needs either data or binary_data_size, and not both")
        if size is not None and (type(size) is not int or size < 0):
            raise InferenceRequestError(f"input {name!r:.80} has binary_data_size {size!r:.40}, expected bytes")
        inputs.append(InferInput(name, tensor["shape"], tensor["datatype"], data))
        contents.append(None if size is None else body[start : start + size])
        start += size or 0
    if start != len(body):
        raise InferenceRequestError(f"the body has {len(body)} bytes, expected {start} by the sizes that it states")
    outputs = [RequestedOutput(output["name"], output.get("parameters")) for output in request.get("outputs") or ()]
    return InferRequest(
        model_name, inputs, request.get("id"), contents, parameters=request.get("parameters"), request_outputs=outputs
    )
