"""Why: what is answered when there is no answer, once, so that REST and gRPC refuse the same things for one reason."""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar

import grpc

from reelway.platform.errors import ServingError


class RefusedRequestError(ServingError):
    """The request is wrong: name, datatype, shape, size or values. Asking again would not help."""

    http: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    rpc: ClassVar[grpc.StatusCode] = grpc.StatusCode.INVALID_ARGUMENT
    outcome: ClassVar[str] = "refused"


class UnknownModelError(RefusedRequestError):
    """Another model, or another release of it, than the one that is served here."""

    http = HTTPStatus.NOT_FOUND
    rpc = grpc.StatusCode.NOT_FOUND


class TooLargeError(RefusedRequestError):
    """More bytes or candidates than one request may have."""

    http = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class SlowError(RefusedRequestError):
    """A body that does not arrive. Whoever sends it holds a connection, and nothing else."""

    http = HTTPStatus.REQUEST_TIMEOUT
    rpc = grpc.StatusCode.DEADLINE_EXCEEDED
    outcome = "late"


class EncodingError(RefusedRequestError):
    """A body that is compressed."""

    http = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class NotReadyError(RefusedRequestError):
    """The release is not loaded yet, or this process is about to end."""

    http = HTTPStatus.SERVICE_UNAVAILABLE
    rpc = grpc.StatusCode.UNAVAILABLE
    outcome = "not_ready"


class BusyError(RefusedRequestError):
    """More requests wait than can be answered soon; another replica may have room."""

    http = HTTPStatus.TOO_MANY_REQUESTS
    rpc = grpc.StatusCode.RESOURCE_EXHAUSTED
    outcome = "busy"


class LateError(RefusedRequestError):
    """Its deadline passed while it waited, so it was not worked out."""

    http = HTTPStatus.GATEWAY_TIMEOUT
    rpc = grpc.StatusCode.DEADLINE_EXCEEDED
    outcome = "late"
