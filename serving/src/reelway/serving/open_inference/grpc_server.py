"""KServe's gRPC server with a message limit, the release as model version, deadlines and complete error statuses.

``kserve.protocol.grpc.server.GRPCServer`` is extended where it is unfit:

- It starts with interceptors that read ``reason`` of errors that have none, so that "not implemented" becomes
  ``UNKNOWN``, and that write a traceback for every invalid request. ``StatusInterceptor`` takes their place.
- A message that is not a protobuf becomes ``UNKNOWN``. ``StatusInterceptor`` parses messages and answers
  ``INVALID_ARGUMENT``.
- It listens on all addresses and does not report its port.
- Its servicer ignores the version of a metadata or readiness request, and passes no deadline to the model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from kserve.errors import InvalidInput, ModelNotFound
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from reelway.platform.errors import ServingError
from reelway.platform.listen_address import resolve_host, url_host
from reelway.serving.open_inference.data_plane import RankerDataPlane, ReadOnlyRepository
from reelway.serving.open_inference.errors import InferenceRequestError
from reelway.serving.open_inference.kserve_model import DEADLINE
from reelway.serving.open_inference.ranker_service import RankerService

log = logging.getLogger(__name__)

_STATUSES: Final = (
    (InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (NotImplementedError, grpc.StatusCode.UNIMPLEMENTED),
)


class RankerServicer(InferenceServicer):
    """KServe's servicer, which in addition checks the requested version and passes the deadline on."""

    def __init__(self, data_plane: RankerDataPlane, repository: ReadOnlyRepository, service: RankerService) -> None:
        super().__init__(data_plane, repository)
        self._service = service

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._service.check_model(request.name, request.version)
        return await super().ModelReady(request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._service.check_model(request.name, request.version)
        response = await super().ModelMetadata(request, context)
        response.versions.append(self._service.release)
        return response

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        left_s = context.time_remaining()
        DEADLINE.set(None if left_s is None else time.monotonic() + left_s)
        try:
            return await super().ModelInfer(request, context)
        except (InvalidInput, ModelNotFound):  # raised before the model, which counts its own requests
            self._service.record_refused(InferenceRequestError())
            raise


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Parses each message and converts each exception to the gRPC status of its class."""

    def __init__(self, service: RankerService) -> None:
        self._service = service

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None

        async def respond(body: bytes, context: Any) -> Any:
            try:
                return await handler.unary_unary(handler.request_deserializer(body), context)
            except DecodeError as error:
                self._service.record_refused(InferenceRequestError())
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the message cannot be parsed: {error}")
            except InferenceRequestError as error:
                await context.abort(error.rpc, str(error))
            except Exception as error:
                for kind, status in _STATUSES:
                    if isinstance(error, kind):
                        await context.abort(status, str(error))
                log.exception("%s failed", handler_call_details.method)
                await context.abort(grpc.StatusCode.INTERNAL, "the request failed; see the server's log")

        return grpc.unary_unary_rpc_method_handler(respond, None, handler.response_serializer)


class RankerGrpcServer(GRPCServer):
    """See the module. ``bind`` starts it; KServe's ``stop`` ends it after the requests in flight."""

    def __init__(
        self,
        port: int,
        data_plane: RankerDataPlane,
        repository: ReadOnlyRepository,
        service: RankerService,
        *,
        host: str,
        max_bytes: int,
        grace_period_s: float,
    ) -> None:
        super().__init__(port, data_plane, repository, kwargs={}, grace_period=grace_period_s)
        self._address = f"{url_host(resolve_host(host))}:{port}"
        self._max_bytes = max_bytes
        self._servicer = RankerServicer(data_plane, repository, service)
        self._interceptor = StatusInterceptor(service)

    async def bind(self) -> int:
        """Starts the server and returns its port.

        Raises:
            ServingError: if the address is in use or does not exist.
        """
        self._server = grpc.aio.server(
            interceptors=(self._interceptor,),
            options=[
                ("grpc.max_receive_message_length", self._max_bytes),
                ("grpc.max_send_message_length", self._max_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        add_GRPCInferenceServiceServicer_to_server(self._servicer, self._server)
        try:
            port: int = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise ServingError(f"cannot listen at {self._address}: {error}; choose a free port") from error
        await self._server.start()
        return port
