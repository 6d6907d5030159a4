"""Requests of the Open Inference Protocol as bytes, so that a test can make any part of them invalid."""

from __future__ import annotations

import json
from typing import Any

import grpc
import httpx
import pytest
from tests.support.serving.rank_server import RankServer

from reelway.serving.open_inference.messages import SERVICE, load_messages

INFER = "/v2/models/ranker/infer"
HEADER = "Inference-Header-Content-Length"
messages = load_messages()


def binary_request(inputs: dict[str, Any]) -> tuple[bytes, bytes]:
    """Returns the request's JSON and the tensors' bytes that follow it."""
    described = [
        {
            "name": name, "datatype": {"f": "FP32", "i": "INT64"}[value.dtype.kind], "shape": list(value.shape),
            "parameters": {"binary_data_size": value.nbytes},
        }
        for name, value in inputs.items()
    ]  # fmt: skip
    return json.dumps({"inputs": described}).encode(), b"".join(value.tobytes() for value in inputs.values())


def post(server: RankServer, text: bytes, binary: bytes = b"", path: str = INFER, **headers: str) -> httpx.Response:
    return server.client.post(path, content=text + binary, headers={HEADER: str(len(text)), **headers})


def rpc(server: RankServer, request: Any, method: str = "ModelInfer") -> bytes:
    body = request if isinstance(request, bytes) else request.SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        answer: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=10)
        return answer


def rpc_request(inputs: dict[str, Any], **changes: Any) -> Any:
    fields = {
        "model_name": "ranker",
        "inputs": [
            {"name": name, "datatype": {"f": "FP32", "i": "INT64"}[value.dtype.kind], "shape": value.shape}
            for name, value in inputs.items()
        ],
        "raw_input_contents": [value.tobytes() for value in inputs.values()],
    }
    return messages.ModelInferRequest(**{**fields, **changes})


def still_answers(server: RankServer) -> None:
    """Asserts that a valid request gets the ranker's output."""
    inputs = server.made.inputs(3)
    answer = post(server, *binary_request(inputs))
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"] == pytest.approx(server.made.outputs(inputs).ravel().tolist(), abs=1e-6)
