"""`reelway rank-server` as others see it: their clients, what it says of itself, wrong requests."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.serving.open_inference_asking import INFER, binary_request, post, rpc, rpc_request, still_answers
from tests.serving.open_inference_clients import fields_of
from tests.serving.rank_server import MadeRelease, RankServer, make_release, running_rank_server

from reelway.serving.open_inference import messages
from reelway.serving.open_inference.json_tensors import HEADER


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRelease:
    return make_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def server(made: MadeRelease) -> Iterator[RankServer]:
    with running_rank_server(made, candidates=2000, drain_s=0.0) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("client", ["kserve", "triton"])
def test_a_client_that_others_wrote_gets_an_answer_to_all_it_can_ask(
    server: RankServer, client: str, tmp_path: Path
) -> None:
    python = sys.executable if client == "kserve" else os.environ.get("REELWAY_TRITON_PYTHON")
    if not python:
        pytest.skip("tritonclient lives in an environment of its own: `make test-clients` makes it and runs this")
    inputs = server.made.inputs(40)
    np.savez(tmp_path / "inputs.npz", **inputs)
    done = subprocess.run(
        [python, "-m", "tests.serving.open_inference_clients", client, str(server.http_port), str(server.grpc_port),
         str(tmp_path / "inputs.npz")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    expected = server.made.outputs(inputs)
    asked = {name: answer for name, answer in seen.items() if "infer" in name}
    assert len(asked) == 4 if client == "kserve" else 5
    for name, answer in asked.items():
        assert (answer["id"], answer["model"], answer["shape"]) == ("asked", "ranker", [40, 8]), name
        assert np.abs(np.array(answer["values"]) - expected).max() < 1e-6, name
    assert all(
        answer is True for name, answer in seen.items() if name.endswith(("live", "ready")) and "other" not in name
    )
    if client == "kserve":
        assert seen["rest other model ready"] is False
        for message, fields in fields_of(messages.FILE).items():
            assert fields == seen["messages"][message], message
    else:
        for way in ("rest", "rpc"):
            assert seen[f"{way} server metadata"]["name"] == "reelway-rank-server"
            assert seen[f"{way} version metadata"] == seen[f"{way} model metadata"]
            metadata = seen[f"{way} model metadata"]
            assert metadata["versions"] == [server.made.release]
            assert [one["name"] for one in metadata["inputs"]] == list(inputs)
            assert [int(size) for size in metadata["inputs"][3]["shape"]] == [-1, inputs["video_dense"].shape[1]]
            assert metadata["outputs"][0]["datatype"] == "FP32"
            assert "has no version '0' here" in seen[f"{way} other version"]


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/ranker/versions/0", "/v2/models/other/ready"])
def test_another_model_or_release_is_not_found(server: RankServer, path: str) -> None:
    for answer in (server.client.get(path), server.client.post(f"{path.removesuffix('/ready')}/infer", content=b"{}")):
        assert answer.status_code == 404
        assert "expected" in answer.json()["error"]


def test_wrong_requests_are_4xx_with_the_reason_and_change_nothing(server: RankServer) -> None:
    inputs = server.made.inputs(5)
    text, binary = binary_request(inputs)
    beyond, infinite = inputs["creator_codes"] + 10**9, inputs["video_embedding"] * np.inf
    refused = {
        "is not JSON": post(server, b"{", b""),
        "is cut off": post(server, text, binary[:-1]),
        "bytes follow the last input": post(server, text, binary + b"\0"),
        "is said to be 'FP64'": post(server, text.replace(b"FP32", b"FP64", 1), binary),
        "there is no input 'viewer_dens'": post(server, text.replace(b"viewer_dense", b"viewer_dens"), binary),
        "expected at most the body's": post(server, text, binary, **{HEADER: "999999999"}),
        "the graph refuses these values": post(server, *binary_request({**inputs, "creator_codes": beyond})),
        "no finite answer": post(server, *binary_request({**inputs, "video_embedding": infinite})),
    }
    for reason, answer in refused.items():
        assert answer.status_code == 400, (reason, answer.text)
        assert reason in answer.json()["error"]
    assert post(server, text, binary, **{"content-encoding": "gzip"}).status_code == 415
    assert server.client.get(INFER).status_code == 405
    assert server.client.get("/v2/repository/index").status_code == 404
    still_answers(server)


def exchanged(server: RankServer, request: bytes, *, then_leave: bool = False) -> bytes:
    """Bytes as they are, and all that comes back until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as connection:
        connection.sendall(request)
        if then_leave:
            return b""
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_a_body_that_does_not_arrive_is_not_waited_for(made: MadeRelease) -> None:
    text, binary = binary_request(made.inputs(5))
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n{HEADER}: {len(text)}\r\n".encode()
    cut_off = head + f"Content-Length: {len(text + binary)}\r\n\r\n".encode() + text + binary[:-1]
    with running_rank_server(made, drain_s=0.0, body_s=0.5) as server:
        answer = exchanged(server, cut_off)
        assert answer.startswith(b"HTTP/1.1 408")
        assert f"{len(text + binary) - 1} bytes of the body arrived in 0.5 s".encode() in answer
        assert exchanged(server, head + b"Content-Length: ten\r\n\r\n").startswith(b"HTTP/1.1 400")
        exchanged(server, cut_off, then_leave=True)
        still_answers(server)
        assert server.metric("reelway_ranking_server_requests_total", outcome="failed") == 0
        assert server.metric("reelway_ranking_server_requests_total", outcome="late") == 1


def test_an_answer_in_bytes_does_not_wait_for_an_acknowledgement(server: RankServer) -> None:
    text, binary = binary_request(server.made.inputs(500))
    text = text[:-1] + b', "parameters": {"binary_data_output": true}}'
    took_s = []
    for _ in range(20):
        begun = time.perf_counter()
        assert post(server, text, binary).headers[HEADER]
        took_s.append(time.perf_counter() - begun)
    # Where it waits, each but the first takes the 40 ms of a delayed acknowledgement.
    assert sorted(took_s)[4] < 0.035


def test_metadata_is_what_the_graphs_file_says(server: RankServer) -> None:
    import onnx

    graph = onnx.load(server.made.folder / "ranker.onnx").graph
    words = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.INT64: "INT64"}

    def said(tensor: Any) -> dict[str, Any]:
        kind = tensor.type.tensor_type
        shape = [-1 if axis.dim_param else axis.dim_value for axis in kind.shape.dim]
        return {"name": tensor.name, "datatype": words[kind.elem_type], "shape": shape}

    inputs, outputs = [said(one) for one in graph.input], [said(one) for one in graph.output]
    for path in ("/v2/models/ranker", f"/v2/models/ranker/versions/{server.made.release}"):
        answer = server.client.get(path).json()
        assert (answer["inputs"], answer["outputs"]) == (inputs, outputs)
        assert answer["versions"] == [server.made.release]
    message = messages.ModelMetadataResponse.FromString(
        rpc(server, messages.ModelMetadataRequest(name="ranker"), "ModelMetadata")
    )
    assert [{"name": o.name, "datatype": o.datatype, "shape": list(o.shape)} for o in message.inputs] == inputs
    assert [{"name": o.name, "datatype": o.datatype, "shape": list(o.shape)} for o in message.outputs] == outputs


def test_what_is_too_large_is_413_before_it_is_kept(server: RankServer) -> None:
    answer = post(server, *binary_request(server.made.inputs(2001)))
    assert answer.status_code == 413
    assert "2001 rows, expected at most 2000" in answer.json()["error"]
    assert post(server, b"{" + b" " * (17 << 20)).status_code == 413
    still_answers(server)


def test_wrong_messages_over_rpc_are_the_callers_fault_with_the_reason(server: RankServer) -> None:
    inputs = server.made.inputs(5)
    right = rpc_request(inputs)
    cut = [*right.raw_input_contents[:-1], right.raw_input_contents[-1][:-1]]
    both, other_type = rpc_request(inputs), rpc_request(inputs)
    both.inputs[0].contents.fp32_contents.append(1.0)
    other_type.inputs[0].datatype = "FP64"
    wrong = [
        (grpc.StatusCode.INVALID_ARGUMENT, "cannot be read", right.SerializeToString()[:-5]),
        (grpc.StatusCode.INVALID_ARGUMENT, "bytes, expected", rpc_request(inputs, raw_input_contents=cut)),
        (grpc.StatusCode.INVALID_ARGUMENT, "contents, expected 7", rpc_request(inputs, raw_input_contents=cut[:-1])),
        (grpc.StatusCode.INVALID_ARGUMENT, "inputs viewer_dense have contents beside raw ones", both),
        (grpc.StatusCode.INVALID_ARGUMENT, "is said to be 'FP64', expected FP32", other_type),
        (grpc.StatusCode.INVALID_ARGUMENT, "missing inputs", rpc_request({})),
        (grpc.StatusCode.NOT_FOUND, "no model 'other'", rpc_request(inputs, model_name="other")),
        (grpc.StatusCode.NOT_FOUND, "no version '0'", rpc_request(inputs, model_version="0")),
        (grpc.StatusCode.INVALID_ARGUMENT, "2001 rows", rpc_request(server.made.inputs(2001))),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", b"\0" * (17 << 20)),
    ]
    for code, reason, request in wrong:
        with pytest.raises(grpc.RpcError) as refusal:
            rpc(server, request)
        assert refusal.value.code() is code, (reason, refusal.value.details())
        assert reason in refusal.value.details()
    with pytest.raises(grpc.RpcError) as refusal:
        rpc(server, b"", "RepositoryModelLoad")
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
    still_answers(server)


def test_bytes_changed_at_random_are_answered_or_refused_and_never_a_fault(server: RankServer) -> None:
    chance = random.Random(0)
    text, binary = binary_request(server.made.inputs(4))
    whole = rpc_request(server.made.inputs(4)).SerializeToString()
    before = server.metric("reelway_ranking_server_requests_total", outcome="failed")
    statuses, codes = set[int](), set[grpc.StatusCode]()
    with grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer")
        for _ in range(100):
            answer = post(server, mutated(text, chance), mutated(binary, chance))
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400, 413), answer.text
            codes.add(infer.future(mutated(whole, chance), timeout=30).code())
    assert {200, 400} <= statuses
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert server.metric("reelway_ranking_server_requests_total", outcome="failed") == before
    still_answers(server)


def mutated(body: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, and sometimes the end cut off or something put in."""
    changed = bytearray(body)
    for _ in range(chance.choice([0, 1, 1, 3, 10])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    if chance.random() < 0.2:
        del changed[chance.randrange(len(changed)) :]
    if chance.random() < 0.2:
        at = chance.randrange(len(changed) + 1)
        changed[at:at] = chance.randbytes(chance.randrange(1, 9))
    return bytes(changed)


def test_it_counts_in_our_names(server: RankServer) -> None:
    names = {"release": server.made.release[:12]}
    before = server.metric("reelway_ranking_server_candidates_total", **names)
    assert post(server, *binary_request(server.made.inputs(7))).status_code == 200
    assert server.metric("reelway_ranking_server_candidates_total", **names) == before + 7
    assert server.metric("reelway_ranking_server_requests_total", outcome="ok", **names) >= 1
    assert server.metric("reelway_ranking_server_latency_seconds_count", **names) >= 1
    assert server.metric("reelway_ranking_server_ready_ratio", **names) == 1
