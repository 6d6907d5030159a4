"""``reelway rank-server`` over its two protocols: foreign clients, metadata, metrics and invalid requests."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.serving.open_inference_requests import (
    HEADER,
    INFER,
    binary_request,
    messages,
    post,
    rpc,
    rpc_request,
    still_answers,
)
from tests.support.serving.rank_server import RankServer, make_release, running_rank_server

from reelway.serving.open_inference.messages import SERVICE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    path = tmp_path_factory.mktemp("release")
    options = ("--max-candidates", "2000", "--drain-seconds", "0")
    with running_rank_server(make_release(path), path / "server.log", *options) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("client", ["kserve", "triton"])
def test_foreign_client_gets_every_response_of_the_protocol(server: RankServer, client: str, tmp_path: Path) -> None:
    python = sys.executable if client == "kserve" else os.environ.get("REELWAY_TRITON_PYTHON")
    if not python:
        pytest.skip("tritonclient needs its own environment: run `make test-clients`")
    inputs = server.made.inputs(40)
    np.savez(tmp_path / "inputs.npz", **inputs)
    done = subprocess.run(
        [python, "-m", "tests.support.serving.open_inference_clients", client, str(server.http_port),
         str(server.grpc_port), str(tmp_path / "inputs.npz")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    expected = server.made.outputs(inputs)
    inferred = {name: answer for name, answer in answers.items() if "infer" in name}
    assert len(inferred) == 4
    for name, answer in inferred.items():
        assert (answer["id"], answer["model"], answer["shape"]) == ("asked", "ranker", [40, 8]), name
        assert np.abs(np.array(answer["values"]) - expected).max() < 1e-6, name
    assert all(
        answer is True for name, answer in answers.items() if name.endswith(("live", "ready")) and "other" not in name
    )
    if client == "kserve":
        assert answers["rest other model ready"] is False
    else:
        for protocol in ("rest", "rpc"):
            assert answers[f"{protocol} server metadata"]["name"] == "reelway-rank-server"
            assert answers[f"{protocol} version metadata"] == answers[f"{protocol} model metadata"]
            metadata = answers[f"{protocol} model metadata"]
            assert metadata["versions"] == [server.made.release]
            assert [one["name"] for one in metadata["inputs"]] == list(inputs)
            assert [int(size) for size in metadata["inputs"][3]["shape"]] == [-1, inputs["video_dense"].shape[1]]
            assert metadata["outputs"][0]["datatype"] == "FP32"
            assert "has no version '0' here" in answers[f"{protocol} other version"]


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/ranker/versions/0", "/v2/models/other/ready"])
def test_other_model_or_version_is_404(server: RankServer, path: str) -> None:
    for answer in (server.client.get(path), server.client.post(f"{path.removesuffix('/ready')}/infer", content=b"{}")):
        assert answer.status_code == 404
        assert "expected" in answer.json()["error"]


def test_invalid_request_is_400_with_the_reason(server: RankServer) -> None:
    inputs = server.made.inputs(5)
    text, binary = binary_request(inputs)
    beyond, infinite = inputs["creator_codes"] + 10**9, inputs["video_embedding"] * np.inf
    rejected = {
        "is not JSON": post(server, b"{", b""),
        f"has {len(text + binary) - 1} bytes, expected {len(text + binary)}": post(server, text, binary[:-1]),
        f"has {len(text + binary) + 1} bytes, expected {len(text + binary)}": post(server, text, binary + b"\0"),
        "has datatype 'FP64', expected FP32": post(server, text.replace(b"FP32", b"FP64", 1), binary),
        "there is no input 'viewer_dens'": post(server, text.replace(b"viewer_dense", b"viewer_dens"), binary),
        "expected at most the body's": post(server, text, binary, **{HEADER: "999999999"}),
        "the ranker rejects these values": post(server, *binary_request({**inputs, "creator_codes": beyond})),
        "no finite output": post(server, *binary_request({**inputs, "video_embedding": infinite})),
    }
    for reason, answer in rejected.items():
        assert answer.status_code == 400, (reason, answer.text)
        assert reason in answer.json()["error"]
    assert post(server, text, binary, **{"content-encoding": "gzip"}).status_code == 415
    assert server.client.get(INFER).status_code == 405
    assert server.client.get("/v2/repository/index").status_code == 404
    still_answers(server)


def test_binary_response_does_not_wait_for_an_acknowledgement(server: RankServer) -> None:
    text, binary = binary_request(server.made.inputs(500))
    text = text[:-1] + b', "parameters": {"binary_data_output": true}}'
    took_s = []
    for _ in range(20):
        start_s = time.perf_counter()
        assert post(server, text, binary).headers[HEADER]
        took_s.append(time.perf_counter() - start_s)
    # A response that waits takes the 40 ms of a delayed acknowledgement, all but the first.
    assert sorted(took_s)[4] < 0.035


def test_metadata_equals_the_onnx_file(server: RankServer) -> None:
    import onnx

    graph = onnx.load(server.made.folder / "ranker.onnx").graph
    datatypes = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.INT64: "INT64"}

    def described(tensor: Any) -> dict[str, Any]:
        kind = tensor.type.tensor_type
        shape = [-1 if axis.dim_param else axis.dim_value for axis in kind.shape.dim]
        return {"name": tensor.name, "datatype": datatypes[kind.elem_type], "shape": shape}

    inputs, outputs = (
        [described(declared) for declared in graph.input],
        [described(declared) for declared in graph.output],
    )
    for path in ("/v2/models/ranker", f"/v2/models/ranker/versions/{server.made.release}"):
        answer = server.client.get(path).json()
        assert (answer["inputs"], answer["outputs"]) == (inputs, outputs)
        assert answer["versions"] == [server.made.release]
    message = messages.ModelMetadataResponse.FromString(
        rpc(server, messages.ModelMetadataRequest(name="ranker"), "ModelMetadata")
    )
    assert [{"name": o.name, "datatype": o.datatype, "shape": list(o.shape)} for o in message.inputs] == inputs
    assert [{"name": o.name, "datatype": o.datatype, "shape": list(o.shape)} for o in message.outputs] == outputs


def test_too_large_request_is_413(server: RankServer) -> None:
    answer = post(server, *binary_request(server.made.inputs(2001)))
    assert answer.status_code == 413
    assert "2001 rows, expected at most 2000" in answer.json()["error"]
    assert post(server, b"{" + b" " * (17 << 20)).status_code == 413
    still_answers(server)


def test_invalid_message_gets_a_client_error_status(server: RankServer) -> None:
    inputs = server.made.inputs(5)
    right = rpc_request(inputs)
    cut = [*right.raw_input_contents[:-1], right.raw_input_contents[-1][:-1]]
    both, other_type = rpc_request(inputs), rpc_request(inputs)
    both.inputs[0].contents.fp32_contents.append(1.0)
    other_type.inputs[0].datatype = "FP64"
    wrong = [
        (grpc.StatusCode.INVALID_ARGUMENT, "cannot be parsed", right.SerializeToString()[:-5]),
        (grpc.StatusCode.INVALID_ARGUMENT, "the data are not", rpc_request(inputs, raw_input_contents=cut)),
        (
            grpc.StatusCode.INVALID_ARGUMENT,
            "does not match the expected number of raw input contents",
            rpc_request(inputs, raw_input_contents=cut[:-1]),
        ),
        (grpc.StatusCode.INVALID_ARGUMENT, "contents field must not be specified when using raw_input_contents", both),
        (grpc.StatusCode.INVALID_ARGUMENT, "has datatype 'FP64', expected FP32", other_type),
        (grpc.StatusCode.INVALID_ARGUMENT, "missing inputs", rpc_request({})),
        (grpc.StatusCode.NOT_FOUND, "Model with name other does not exist", rpc_request(inputs, model_name="other")),
        (grpc.StatusCode.NOT_FOUND, "no version '0'", rpc_request(inputs, model_version="0")),
        (grpc.StatusCode.INVALID_ARGUMENT, "2001 rows", rpc_request(server.made.inputs(2001))),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", b"\0" * (17 << 20)),
    ]
    before = server.metric("reelway_ranking_server_requests_total", outcome="refused")
    for code, reason, request in wrong:
        with pytest.raises(grpc.RpcError) as refusal:
            rpc(server, request)
        assert refusal.value.code() is code, (reason, refusal.value.details())
        assert reason in refusal.value.details()
    counted = server.metric("reelway_ranking_server_requests_total", outcome="refused") - before
    assert counted == len(wrong) - 1  # gRPC itself rejects a message that is too large
    still_answers(server)


def test_model_cannot_be_loaded_or_unloaded(server: RankServer) -> None:
    """KServe's servers let every client unload a model."""
    for verb in ("Load", "Unload"):
        answer = server.client.post(f"/v2/repository/models/ranker/{verb.lower()}")
        assert (answer.status_code, "never changes" in answer.json()["error"]) == (501, True)
        with pytest.raises(grpc.RpcError, match="never changes") as refusal:
            rpc(server, messages.RepositoryModelLoadRequest(model_name="ranker"), f"RepositoryModel{verb}")
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
    still_answers(server)


def test_other_protocol_of_kserve_is_a_client_error(server: RankServer) -> None:
    assert server.client.post("/v1/models/ranker:predict", json={"instances": [[1]]}).status_code == 400
    assert server.client.post("/v1/models/ranker:explain", json={"instances": [[1]]}).status_code == 400
    headers = {"ce-id": "1", "ce-source": "test", "ce-type": "test", "ce-specversion": "1.0"}
    assert post(server, *binary_request(server.made.inputs(3)), **headers).status_code == 200
    still_answers(server)


def test_mutated_request_is_never_a_server_error(server: RankServer) -> None:
    rng = random.Random(0)
    text, binary = binary_request(server.made.inputs(4))
    message = rpc_request(server.made.inputs(4)).SerializeToString()
    before = server.metric("reelway_ranking_server_requests_total", outcome="failed")
    statuses, codes = set[int](), set[grpc.StatusCode]()
    with grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for _ in range(100):
            answer = post(server, mutated(text, rng), mutated(binary, rng))
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400, 413), answer.text
            codes.add(infer.future(mutated(message, rng), timeout=30).code())
    assert {200, 400} <= statuses
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert server.metric("reelway_ranking_server_requests_total", outcome="failed") == before
    still_answers(server)


def mutated(body: bytes, rng: random.Random) -> bytes:
    """Changes a few bytes, and sometimes removes the end or inserts bytes."""
    changed = bytearray(body)
    for _ in range(rng.choice([0, 1, 1, 3, 10])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed)) :]
    if rng.random() < 0.2:
        offset = rng.randrange(len(changed) + 1)
        changed[offset:offset] = rng.randbytes(rng.randrange(1, 9))
    return bytes(changed)


def test_rank_server_exports_reelway_metrics(server: RankServer) -> None:
    names = {"release": server.made.release[:12]}
    before = server.metric("reelway_ranking_server_candidates_total", **names)
    assert post(server, *binary_request(server.made.inputs(7))).status_code == 200
    assert server.metric("reelway_ranking_server_candidates_total", **names) == before + 7
    assert server.metric("reelway_ranking_server_requests_total", outcome="ok", **names) >= 1
    assert server.metric("reelway_ranking_server_latency_seconds_count", **names) >= 1
    assert server.metric("reelway_ranking_server_ready_ratio", **names) == 1
