"""Errors of an inference request, each with its HTTP status and its gRPC status code.

::

    InferenceRequestError            400  INVALID_ARGUMENT
    ├── ModelNotFoundError           404  NOT_FOUND
    ├── RequestTooLargeError         413  INVALID_ARGUMENT
    ├── RequestTimeoutError          408  DEADLINE_EXCEEDED
    ├── UnsupportedEncodingError     415  INVALID_ARGUMENT
    ├── ServerBusyError              429  RESOURCE_EXHAUSTED
    └── DeadlineExceededError        504  DEADLINE_EXCEEDED
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar

import grpc

from reelway.platform.errors import ServingError


class InferenceRequestError(ServingError):
    """The request is invalid: a name, datatype, shape, size or value. A retry does not help."""

    http: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    rpc: ClassVar[grpc.StatusCode] = grpc.StatusCode.INVALID_ARGUMENT
    outcome: ClassVar[str] = "refused"


class ModelNotFoundError(InferenceRequestError):
    """The request names another model, or another release, than the server has."""

    http = HTTPStatus.NOT_FOUND
    rpc = grpc.StatusCode.NOT_FOUND


class RequestTooLargeError(InferenceRequestError):
    """The request has more bytes or candidates than the server accepts."""

    http = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class RequestTimeoutError(InferenceRequestError):
    """The request's body did not arrive in time."""

    http = HTTPStatus.REQUEST_TIMEOUT
    rpc = grpc.StatusCode.DEADLINE_EXCEEDED
    outcome = "late"


class UnsupportedEncodingError(InferenceRequestError):
    """The request's body is compressed."""

    http = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class ServerBusyError(InferenceRequestError):
    """The queue is full. Another replica may have room."""

    http = HTTPStatus.TOO_MANY_REQUESTS
    rpc = grpc.StatusCode.RESOURCE_EXHAUSTED
    outcome = "busy"


class DeadlineExceededError(InferenceRequestError):
    """The request's deadline passed in the queue, so the ranker did not run."""

    http = HTTPStatus.GATEWAY_TIMEOUT
    rpc = grpc.StatusCode.DEADLINE_EXCEEDED
    outcome = "late"
