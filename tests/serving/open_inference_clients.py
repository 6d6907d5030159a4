"""Clients that were written elsewhere, each in a process of its own: their message definitions cannot share one.

``python -m tests.serving.open_inference_clients kserve|triton HTTP_PORT GRPC_PORT NPZ`` asks a running server for
everything that the client can ask by the protocol, and prints a JSON object: what was asked -> the answer. ``NPZ``
holds the ranker's inputs.
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


def fields_of(file: Any) -> dict[str, list[Any]]:
    """Message -> its fields, of a FileDescriptorProto: name, number, type, label, type's name, one of several."""
    found: dict[str, list[Any]] = {}

    def look(messages: Any, outer: str) -> None:
        for message in messages:
            name = f"{outer}{message.name}"
            found[name] = [
                [f.name, f.number, f.type, f.label, f.type_name, f.HasField("oneof_index")] for f in message.field
            ]
            look(message.nested_type, f"{name}.")

    look(file.message_type, "")
    return found


async def ask_as_kserve(http_port: int, grpc_port: int, inputs: Inputs) -> dict[str, Any]:
    """KServe's own client, which is asynchronous."""
    sys.argv = sys.argv[:1]  # kserve reads the command line when it is imported
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

    def told(answer: Any) -> dict[str, Any]:
        output = answer.outputs[0]
        values = output.as_numpy()
        return {"id": answer.id, "model": answer.model_name, "shape": output.shape, "values": values.tolist()}

    from google.protobuf import descriptor_pb2
    from kserve.protocol.grpc import grpc_predict_v2_pb2

    definition = descriptor_pb2.FileDescriptorProto()
    grpc_predict_v2_pb2.DESCRIPTOR.CopyToProto(definition)
    url, seen = f"http://127.0.0.1:{http_port}", dict[str, Any]()
    seen["messages"] = fields_of(definition)
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    seen["rest live"] = await rest.is_server_live(url)
    seen["rest ready"] = await rest.is_server_ready(url)
    seen["rest model ready"] = await rest.is_model_ready(url, MODEL)
    seen["rest other model ready"] = await rest.is_model_ready(url, "other")
    for kind, binary in (("json", False), ("binary", True)):
        seen[f"rest infer {kind}"] = told(await rest.infer(url, request(binary), model_name=MODEL))
    await rest.close()
    async with InferenceGRPCClient(f"127.0.0.1:{grpc_port}") as rpc:
        seen["rpc live"] = await rpc.is_server_live()
        seen["rpc ready"] = await rpc.is_server_ready()
        seen["rpc model ready"] = await rpc.is_model_ready(MODEL)
        for kind, binary in (("contents", False), ("raw", True)):
            seen[f"rpc infer {kind}"] = told(await rpc.infer(request(binary)))
    return seen


def ask_as_triton(http_port: int, grpc_port: int, inputs: Inputs) -> dict[str, Any]:
    """Triton's client, which asks for more than KServe's: metadata and versions."""
    import tritonclient.grpc
    import tritonclient.http
    from google.protobuf.json_format import MessageToDict
    from tritonclient.utils import np_to_triton_dtype

    seen: dict[str, Any] = {}

    def ask(name: str, kind: Any, client: Any) -> None:
        def infer(version: str, **binary: bool) -> dict[str, Any]:
            tensors = []
            for tensor_name, value in inputs.items():
                tensor = kind.InferInput(tensor_name, value.shape, np_to_triton_dtype(value.dtype))
                tensor.set_data_from_numpy(value, **binary)
                tensors.append(tensor)
            wanted = [kind.InferRequestedOutput("outputs", **binary)]
            answer = client.infer(MODEL, tensors, model_version=version, outputs=wanted, request_id="asked")
            values = answer.as_numpy("outputs")
            head = answer.get_response()
            said = head if isinstance(head, dict) else MessageToDict(head, preserving_proto_field_name=True)
            return {"id": said["id"], "model": said["model_name"], "shape": values.shape, "values": values.tolist()}

        def plain(message: Any) -> Any:
            return message if isinstance(message, dict) else MessageToDict(message, preserving_proto_field_name=True)

        seen[f"{name} live"] = client.is_server_live()
        seen[f"{name} ready"] = client.is_server_ready()
        seen[f"{name} model ready"] = client.is_model_ready(MODEL)
        seen[f"{name} server metadata"] = plain(client.get_server_metadata())
        metadata = seen[f"{name} model metadata"] = plain(client.get_model_metadata(MODEL))
        version = metadata["versions"][0]
        seen[f"{name} version ready"] = client.is_model_ready(MODEL, version)
        seen[f"{name} version metadata"] = plain(client.get_model_metadata(MODEL, version))
        for words, binary in (("json", {"binary_data": False}), ("binary", {"binary_data": True})):
            if name == "rest":
                seen[f"rest infer {words}"] = infer("", **binary)
        seen[f"{name} infer of a version"] = infer(version)
        try:
            infer("0")
        except Exception as refusal:
            seen[f"{name} other version"] = str(refusal)

    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{http_port}") as rest:
        ask("rest", tritonclient.http, rest)
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as rpc:
        ask("rpc", tritonclient.grpc, rpc)
    return seen


def main() -> None:
    kind, http_port, grpc_port, path = sys.argv[1:]
    inputs = dict(np.load(path))
    if kind == "kserve":
        seen = asyncio.run(ask_as_kserve(int(http_port), int(grpc_port), inputs))
    else:
        seen = ask_as_triton(int(http_port), int(grpc_port), inputs)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
