"""Why: the protocol's gRPC messages as a table that can be read, in a pool of their own.

A process may hold every message name once per pool, and the clients that others wrote fill the default one with these
very names. So nothing is generated and nothing is registered there; ``test_open_inference_messages`` compares the table
with the definition that KServe ships. Fields are numbered from 1 in the order in which they stand here.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"
METHODS: Final = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

# "name kind": a scalar or a message; * is repeated, and `parameters` a map of string to InferParameter.
_TABLE: Final[dict[str, tuple[str, ...]]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("live bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("ready bool",),
    "ModelReadyRequest": ("name string", "version string"),
    "ModelReadyResponse": ("ready bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("name string", "version string", "extensions string*"),
    "ModelMetadataRequest": ("name string", "version string"),
    "ModelMetadataResponse": (
        "name string", "versions string*", "platform string",
        "inputs ModelMetadataResponse.TensorMetadata*", "outputs ModelMetadataResponse.TensorMetadata*",
    ),
    "ModelMetadataResponse.TensorMetadata": ("name string", "datatype string", "shape int64*"),
    "ModelInferRequest": (
        "model_name string", "model_version string", "id string", "parameters map",
        "inputs ModelInferRequest.InferInputTensor*", "outputs ModelInferRequest.InferRequestedOutputTensor*",
        "raw_input_contents bytes*",
    ),
    "ModelInferRequest.InferInputTensor": (
        "name string", "datatype string", "shape int64*", "parameters map", "contents InferTensorContents",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("name string", "parameters map"),
    "ModelInferResponse": (
        "model_name string", "model_version string", "id string", "parameters map",
        "outputs ModelInferResponse.InferOutputTensor*", "raw_output_contents bytes*",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "name string", "datatype string", "shape int64*", "parameters map", "contents InferTensorContents",
    ),
    "InferParameter": ("bool_param bool", "int64_param int64", "string_param string"),
    "InferTensorContents": (
        "bool_contents bool*", "int_contents int32*", "int64_contents int64*", "uint_contents uint32*",
        "uint64_contents uint64*", "fp32_contents float*", "fp64_contents double*", "bytes_contents bytes*",
    ),
}  # fmt: skip
_ONE_OF: Final = {"InferParameter": "parameter_choice"}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for path, fields in _TABLE.items():
        outer, _, name = path.rpartition(".")
        message = made[path] = (made[outer].nested_type if outer else file.message_type).add(name=name)
        if path in _ONE_OF:
            message.oneof_decl.add(name=_ONE_OF[path])
        for number, words in enumerate(fields, start=1):
            _add_field(message, path, number, words)
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, path: str, number: int, words: str) -> None:
    name, kind = words.split()
    if kind == "map":
        entry = message.nested_type.add(name="ParametersEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
        _add_field(entry, f"{path}.ParametersEntry", 1, "key string")
        _add_field(entry, f"{path}.ParametersEntry", 2, "value InferParameter")
        kind = f"{path}.ParametersEntry*"
    repeated, kind = kind.endswith("*"), kind.removesuffix("*")
    field = message.field.add(
        name=name, number=number, label=Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
    )
    if kind[0].isupper():
        field.type, field.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = Field.Type.Value(f"TYPE_{kind.upper()}")
    if path in _ONE_OF:
        field.oneof_index = 0


FILE: Final = _file()
_POOL: Final = descriptor_pool.DescriptorPool()
_POOL.Add(FILE)


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


ServerLiveResponse: Final = _message("ServerLiveResponse")
ServerReadyResponse: Final = _message("ServerReadyResponse")
ServerMetadataResponse: Final = _message("ServerMetadataResponse")
ModelReadyRequest: Final = _message("ModelReadyRequest")
ModelReadyResponse: Final = _message("ModelReadyResponse")
ModelMetadataRequest: Final = _message("ModelMetadataRequest")
ModelMetadataResponse: Final = _message("ModelMetadataResponse")
ModelInferRequest: Final = _message("ModelInferRequest")
ModelInferResponse: Final = _message("ModelInferResponse")
