"""The REST way to ask, with the metrics and what Kubernetes probes. Every refusal is ``{"error": reason}``."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from reelway.serving.open_inference.json_tensors import HEADER, parse_request, write_answer
from reelway.serving.open_inference.model import MODEL, PLATFORM, LoadedRanker, ServedRanker
from reelway.serving.open_inference.refusals import (
    EncodingError,
    NotReadyError,
    RefusedRequestError,
    SlowError,
    TooLargeError,
)
from reelway.serving.open_inference.rpc import EXTENSIONS, NAME

log = logging.getLogger(__name__)


def build_rest_api(served: ServedRanker, *, max_bytes: int, body_s: float) -> FastAPI:
    """The ASGI application.

    Args:
        max_bytes: of one request's body.
        body_s: in which all of it must have arrived.
    """
    api = FastAPI(title="Reelway ranker, Open Inference Protocol v2", version="2", openapi_url=None)

    @api.get("/v2")
    async def server_metadata() -> dict[str, Any]:
        return {"name": NAME, "version": version("reelway-serving"), "extensions": list(EXTENSIONS)}

    @api.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @api.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": _refuse_unless_ready(served)}

    @api.get("/v2/models/{model}/ready")
    @api.get("/v2/models/{model}/versions/{release}/ready")
    async def model_ready(model: str, release: str = "") -> dict[str, Any]:
        served.knows(model, release)
        return {"name": MODEL, "ready": _refuse_unless_ready(served)}

    @api.get("/v2/models/{model}")
    @api.get("/v2/models/{model}/versions/{release}")
    async def model_metadata(model: str, release: str = "") -> dict[str, Any]:
        served.knows(model, release)
        signature = served.loaded.signature
        return {
            "name": MODEL,
            "versions": [served.release],
            "platform": PLATFORM,
            "inputs": [spec.metadata() for spec in signature.inputs],
            "outputs": [spec.metadata() for spec in signature.outputs],
        }

    @api.post("/v2/models/{model}/infer")
    @api.post("/v2/models/{model}/versions/{release}/infer")
    async def infer(request: Request, model: str, release: str = "") -> Response:
        try:
            served.knows(model, release)
            body = await _body(request, max_bytes, body_s)
        except RefusedRequestError as refusal:
            served.count_refused(refusal)
            raise
        answer, json_length = await served.answer(partial(_work, served, body, request.headers.get(HEADER)))
        if json_length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={HEADER: str(json_length)})

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(served.registry), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(RefusedRequestError)
    async def refuse(_: Request, refusal: RefusedRequestError) -> Response:
        # The rest of a body that did not come may come later, and would be taken for the next request.
        headers = {"connection": "close"} if isinstance(refusal, SlowError) else None
        return JSONResponse({"error": str(refusal)}, status_code=refusal.http, headers=headers)

    @api.exception_handler(ClientDisconnect)
    async def leave(_: Request, gone: ClientDisconnect) -> Response:  # noqa: ARG001
        """Nobody reads this; whoever asked went away before the request was whole."""
        return Response(status_code=400)

    @api.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        log.error("a request could not be answered", exc_info=error)
        return JSONResponse({"error": "no answer is possible; see the server's log"}, status_code=500)

    return api


def _refuse_unless_ready(served: ServedRanker) -> bool:
    if not served.ready:
        raise NotReadyError("it is being loaded, or is about to end")
    return True


def _work(
    served: ServedRanker, body: bytes, json_length: str | None, loaded: LoadedRanker
) -> tuple[int, tuple[bytes, int | None]]:
    asked = parse_request(body, json_length, loaded.signature)
    outputs = loaded.run(asked.inputs)
    head = {"model_name": MODEL, "model_version": served.release}
    return len(outputs[asked.outputs[0].name]), write_answer(asked, outputs, head)


async def _body(request: Request, max_bytes: int, within_s: float) -> bytes:
    """Raises TooLargeError before more than ``max_bytes`` are kept, EncodingError where it is compressed, SlowError."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise EncodingError(f"the body is encoded as {encoding[:40]!r}, expected it as it is")
    parts, size = [], 0
    try:
        async with asyncio.timeout(within_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise TooLargeError(f"the body has more than {max_bytes} bytes; ask for fewer candidates at a time")
                parts.append(part)
    except TimeoutError as error:
        raise SlowError(f"{size} bytes of the body arrived in {within_s:g} s, expected all of it") from error
    return b"".join(parts)
