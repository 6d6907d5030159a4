"""The gRPC way to ask: bytes in, bytes out, so that a message that is none is refused like any other wrong request."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from reelway.serving.open_inference import messages
from reelway.serving.open_inference.model import MODEL, PLATFORM, LoadedRanker, ServedRanker
from reelway.serving.open_inference.refusals import RefusedRequestError
from reelway.serving.open_inference.tensors import Array, Declared, TensorSpec

log = logging.getLogger(__name__)

NAME: Final = "reelway-rank-server"
EXTENSIONS: Final = ("binary_tensor_data",)


class RpcMethods:
    """``GRPCInferenceService`` without the repository extension: what is served never changes while it runs."""

    def __init__(self, served: ServedRanker) -> None:
        self._served = served

    def handler(self) -> grpc.GenericRpcHandler:
        """All methods, for a ``grpc.aio`` server."""
        methods: dict[str, Callable[[bytes, float | None], Awaitable[Any]]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        handlers = {name: grpc.unary_unary_rpc_method_handler(partial(_reply, work)) for name, work in methods.items()}
        return grpc.method_handlers_generic_handler(messages.SERVICE, handlers)

    async def _server_live(self, _request: bytes, _within_s: float | None) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def _server_ready(self, _request: bytes, _within_s: float | None) -> Any:
        return messages.ServerReadyResponse(ready=self._served.ready)

    async def _model_ready(self, request: bytes, _within_s: float | None) -> Any:
        asked = _parsed(messages.ModelReadyRequest, request)
        self._served.knows(asked.name, asked.version)
        return messages.ModelReadyResponse(ready=self._served.ready)

    async def _server_metadata(self, _request: bytes, _within_s: float | None) -> Any:
        return messages.ServerMetadataResponse(name=NAME, version=version("reelway-serving"), extensions=EXTENSIONS)

    async def _model_metadata(self, request: bytes, _within_s: float | None) -> Any:
        asked = _parsed(messages.ModelMetadataRequest, request)
        self._served.knows(asked.name, asked.version)
        signature = self._served.loaded.signature
        return messages.ModelMetadataResponse(
            name=MODEL,
            versions=[self._served.release],
            platform=PLATFORM,
            inputs=[spec.metadata() for spec in signature.inputs],
            outputs=[spec.metadata() for spec in signature.outputs],
        )

    async def _infer(self, request: bytes, within_s: float | None) -> Any:
        return await self._served.answer(partial(self._work, request), within_s)

    def _work(self, request: bytes, loaded: LoadedRanker) -> tuple[int, Any]:
        asked = _parsed(messages.ModelInferRequest, request)
        self._served.knows(asked.model_name, asked.model_version)
        wanted = loaded.signature.requested(output.name for output in asked.outputs)
        inputs = _inputs(asked, loaded)
        outputs = loaded.run(inputs)
        raw = bool(asked.raw_input_contents)
        answer = messages.ModelInferResponse(
            model_name=MODEL,
            model_version=self._served.release,
            id=asked.id,
            outputs=[_output(spec, outputs[spec.name], raw) for spec in wanted],
            raw_output_contents=[outputs[spec.name].tobytes() for spec in wanted] if raw else (),
        )
        return len(outputs[wanted[0].name]), answer


def _inputs(asked: Any, loaded: LoadedRanker) -> dict[str, Array]:
    declared = [Declared(one.name, one.datatype, list(one.shape)) for one in asked.inputs]
    specs = loaded.signature.specs_of(declared)
    raw = asked.raw_input_contents
    if raw:
        if len(raw) != len(declared):
            raise RefusedRequestError(f"there are {len(raw)} raw contents, expected {len(declared)}, one an input")
        if both := [one.name for one in asked.inputs if one.HasField("contents")]:
            raise RefusedRequestError(f"inputs {', '.join(both)} have contents beside raw ones; expected one of them")
        return {
            spec.name: spec.from_bytes(one.shape, data) for spec, one, data in zip(specs, declared, raw, strict=True)
        }
    return {
        spec.name: spec.from_values(one.shape, list(getattr(given.contents, spec.datatype.contents)))
        for spec, one, given in zip(specs, declared, asked.inputs, strict=True)
    }


def _output(spec: TensorSpec, value: Array, raw: bool) -> dict[str, Any]:
    contents = {} if raw else {"contents": {spec.datatype.contents: value.ravel().tolist()}}
    return {"name": spec.name, "datatype": spec.datatype.name, "shape": value.shape, **contents}


def _parsed(kind: Callable[[], Any], request: bytes) -> Any:
    message = kind()
    try:
        message.ParseFromString(request)
    except DecodeError as error:
        raise RefusedRequestError(f"the message cannot be read: {error}") from error
    return message


async def _reply(work: Callable[[bytes, float | None], Awaitable[Any]], request: bytes, context: Any) -> bytes:
    try:
        answer = await work(request, context.time_remaining())
    except RefusedRequestError as refusal:
        await context.abort(refusal.rpc, str(refusal))
        raise
    except Exception:
        log.exception("a request could not be answered")
        await context.abort(grpc.StatusCode.INTERNAL, "no answer is possible; see the server's log")
        raise
    serialised: bytes = answer.SerializeToString()
    return serialised
