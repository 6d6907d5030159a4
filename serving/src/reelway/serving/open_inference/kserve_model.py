"""The ``kserve.Model`` of a release's ranker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

from kserve import InferOutput, InferRequest, InferResponse, Model

from reelway.serving.open_inference.errors import InferenceRequestError
from reelway.serving.open_inference.messages import MODEL
from reelway.serving.open_inference.ranker_service import LoadedRanker, RankerService

DEADLINE: Final[ContextVar[float | None]] = ContextVar("deadline", default=None)
"""Deadline of the current gRPC call on the monotonic clock. KServe's data plane has no argument for it."""


class RankerModel(Model):
    """Ranks the candidates of an ``InferRequest``. It is ready as long as it exists and is never unloaded."""

    def __init__(self, service: RankerService) -> None:
        super().__init__(MODEL)
        self._service = service
        self.ready = True

    def load(self) -> bool:
        return bool(self.ready)

    def get_input_types(self) -> list[dict[str, Any]]:
        return [spec.metadata() for spec in self._service.ranker.signature.inputs]

    def get_output_types(self) -> list[dict[str, Any]]:
        return [spec.metadata() for spec in self._service.ranker.signature.outputs]

    async def predict(
        self,
        payload: Any,
        headers: Mapping[str, str] | None = None,  # noqa: ARG002
        response_headers: dict[str, str] | None = None,  # noqa: ARG002
    ) -> InferResponse:
        if not isinstance(payload, InferRequest):
            raise InferenceRequestError("the request is not of protocol v2; send it to /v2/models/ranker/infer")
        deadline = DEADLINE.get()
        within_s = None if deadline is None else deadline - time.monotonic()
        return await self._service.submit(partial(self._respond, payload), within_s)

    def _respond(self, request: InferRequest, ranker: LoadedRanker) -> tuple[int, InferResponse]:
        self._service.check_model(request.model_name, request.model_version or "")
        signature = ranker.signature
        requested = signature.requested_outputs(output.name for output in request.request_outputs or ())
        values = ranker.run(signature.read_inputs(request.inputs))
        outputs = [InferOutput(spec.name, list(values[spec.name].shape), spec.datatype) for spec in requested]
        for output in outputs:
            if request.from_grpc:  # raw contents for a request with raw contents; KServe fails on an array there
                output.set_data_from_numpy(values[output.name], binary_data=request.use_binary_outputs)
            else:
                output.data = values[output.name]
        response = InferResponse(
            response_id=request.id or "",
            model_name=MODEL,
            model_version=self._service.release,
            infer_outputs=outputs,
            use_binary_outputs=request.use_binary_outputs,
            requested_outputs=request.request_outputs,
        )
        return len(values[requested[0].name]), response
