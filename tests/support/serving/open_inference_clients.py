"""KServe's client and Triton's, each in a separate process, because their protobuf messages have equal names.

``python -m tests.support.serving.open_inference_clients kserve|triton HTTP_PORT GRPC_PORT NPZ`` sends every request of
the protocol that the client supports to a running server. It prints a JSON object of responses by request. ``NPZ`` has
the ranker's inputs.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "ranker"
Inputs = dict[str, NDArray[Any]]


async def send_with_kserve(http_port: int, grpc_port: int, inputs: Inputs) -> dict[str, Any]:
    sys.argv = sys.argv[:1]  # kserve parses the process's command line when it is imported
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.protocol.infer_type import RequestedOutput
    from kserve.utils.numpy_codec import from_np_dtype

    def request(binary: bool) -> Any:
        tensors = []
        for name, value in inputs.items():
            tensor = InferInput(name, list(value.shape), from_np_dtype(value.dtype))
            tensor.set_data_from_numpy(value, binary_data=binary)
            tensors.append(tensor)
        wanted = [RequestedOutput("outputs", parameters={"binary_data": binary})]
        return InferRequest(MODEL, tensors, request_id="asked", request_outputs=wanted)

    def summary(answer: Any) -> dict[str, Any]:
        output = answer.outputs[0]
        values = output.as_numpy()
        return {"id": answer.id, "model": answer.model_name, "shape": output.shape, "values": values.tolist()}

    url, answers = f"http://127.0.0.1:{http_port}", dict[str, Any]()
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    answers["rest live"] = await rest.is_server_live(url)
    answers["rest ready"] = await rest.is_server_ready(url)
    answers["rest model ready"] = await rest.is_model_ready(url, MODEL)
    answers["rest other model ready"] = await rest.is_model_ready(url, "other")
    for kind, binary in (("json", False), ("binary", True)):
        answers[f"rest infer {kind}"] = summary(await rest.infer(url, request(binary), model_name=MODEL))
    await rest.close()
    async with InferenceGRPCClient(f"127.0.0.1:{grpc_port}") as rpc:
        answers["rpc live"] = await rpc.is_server_live()
        answers["rpc ready"] = await rpc.is_server_ready()
        answers["rpc model ready"] = await rpc.is_model_ready(MODEL)
        for kind, binary in (("contents", False), ("raw", True)):
            answers[f"rpc infer {kind}"] = summary(await rpc.infer(request(binary)))
    return answers


def send_with_triton(http_port: int, grpc_port: int, inputs: Inputs) -> dict[str, Any]:
    """Triton's client requests metadata and versions as well."""
    import tritonclient.grpc
    import tritonclient.http
    from google.protobuf.json_format import MessageToDict
    from tritonclient.utils import np_to_triton_dtype

    answers: dict[str, Any] = {}

    def send_all(name: str, kind: Any, client: Any) -> None:
        def infer(version: str, **binary: bool) -> dict[str, Any]:
            tensors = []
            for tensor_name, value in inputs.items():
                tensor = kind.InferInput(tensor_name, value.shape, np_to_triton_dtype(value.dtype))
                tensor.set_data_from_numpy(value, **binary)
                tensors.append(tensor)
            wanted = [kind.InferRequestedOutput("outputs", **binary)]
            answer = client.infer(MODEL, tensors, model_version=version, outputs=wanted, request_id="asked")
            values = answer.as_numpy("outputs")
            head = plain(answer.get_response())
            return {"id": head["id"], "model": head["model_name"], "shape": values.shape, "values": values.tolist()}

        def plain(message: Any) -> Any:
            return message if isinstance(message, dict) else MessageToDict(message, preserving_proto_field_name=True)

        answers[f"{name} live"] = client.is_server_live()
        answers[f"{name} ready"] = client.is_server_ready()
        answers[f"{name} model ready"] = client.is_model_ready(MODEL)
        answers[f"{name} server metadata"] = plain(client.get_server_metadata())
        metadata = answers[f"{name} model metadata"] = plain(client.get_model_metadata(MODEL))
        version = metadata["versions"][0]
        answers[f"{name} version ready"] = client.is_model_ready(MODEL, version)
        answers[f"{name} version metadata"] = plain(client.get_model_metadata(MODEL, version))
        for encoding, binary in (("json", {"binary_data": False}), ("binary", {"binary_data": True})):
            if name == "rest":
                answers[f"rest infer {encoding}"] = infer("", **binary)
        answers[f"{name} infer of a version"] = infer(version)
        try:
            infer("0")
        except Exception as error:
            answers[f"{name} other version"] = str(error)

    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{http_port}") as rest:
        send_all("rest", tritonclient.http, rest)
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as rpc:
        send_all("rpc", tritonclient.grpc, rpc)
    return answers


def main() -> None:
    kind, http_port, grpc_port, path = sys.argv[1:]
    inputs = dict(np.load(path))
    if kind == "kserve":
        answers = asyncio.run(send_with_kserve(int(http_port), int(grpc_port), inputs))
    else:
        answers = send_with_triton(int(http_port), int(grpc_port), inputs)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
