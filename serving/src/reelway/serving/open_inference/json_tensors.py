"""Why: over REST a request is JSON, with tensors as lists in it or as bytes after it; here it is taken apart.

The bytes follow the JSON in the order of the inputs that have ``binary_data_size``; a header says how long the JSON is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reelway.serving.open_inference.refusals import RefusedRequestError
from reelway.serving.open_inference.tensors import Array, Declared, Signature, TensorSpec

HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Asked:
    """A request over REST. ``binary`` are the outputs that are wanted as bytes."""

    id: str
    inputs: Mapping[str, Array]
    outputs: Sequence[TensorSpec]
    binary: frozenset[str]


def parse_request(body: bytes, json_length: str | None, signature: Signature) -> Asked:
    """What is asked.

    Raises:
        RefusedRequestError: it is not what the protocol or the graph wants, with the place and what was expected.
    """
    document, rest = _split(body, json_length)
    parameters = _mapping(document.get("parameters"), "parameters")
    wanted = [_mapping(one, "an output") for one in _listed(document.get("outputs"), "outputs")]
    outputs = signature.requested(one.get("name") for one in wanted)
    default = parameters.get("binary_data_output") is True
    chosen = {
        str(one["name"]): _mapping(one.get("parameters"), "an output's parameters").get("binary_data", default)
        for one in wanted
    }
    request_id = document.get("id", "")
    if not isinstance(request_id, str):
        raise RefusedRequestError("the id is not a string")
    return Asked(
        request_id,
        _inputs(document, rest, signature),
        outputs,
        frozenset(spec.name for spec in outputs if chosen.get(spec.name, default) is True),
    )


def write_answer(asked: Asked, values: Mapping[str, Array], head: Mapping[str, Any]) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON where bytes follow."""
    described: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for spec in asked.outputs:
        value = values[spec.name]
        one: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype.name, "shape": list(value.shape)}
        if spec.name in asked.binary:
            binary.append(value.tobytes())
            one["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            one["data"] = value.ravel().tolist()
        described.append(one)
    named = {"id": asked.id} if asked.id else {}
    text = json.dumps({**head, **named, "outputs": described}, separators=(",", ":"), allow_nan=False).encode()
    return (b"".join([text, *binary]), len(text)) if binary else (text, None)


def _split(body: bytes, json_length: str | None) -> tuple[dict[str, Any], memoryview]:
    length = len(body)
    if json_length is not None:
        if not (json_length.isascii() and json_length.isdigit()) or len(json_length) > 12 or int(json_length) > length:
            raise RefusedRequestError(f"{HEADER} is {json_length[:40]!r}, expected at most the body's {length} bytes")
        length = int(json_length)
    try:
        document = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise RefusedRequestError(f"the request is not JSON: {str(error)[:200]}") from error
    return _mapping(document, "the request"), memoryview(body)[length:]


def _inputs(document: Mapping[str, Any], rest: memoryview, signature: Signature) -> dict[str, Array]:
    given = [_mapping(one, "an input") for one in _listed(document.get("inputs"), "inputs")]
    specs = signature.specs_of([Declared(one.get("name"), one.get("datatype"), one.get("shape")) for one in given])
    inputs: dict[str, Array] = {}
    for spec, one in zip(specs, given, strict=True):
        size = _mapping(one.get("parameters"), "an input's parameters").get("binary_data_size")
        if (size is None) == (one.get("data") is None):
            raise RefusedRequestError(f"input {spec.name!r} has data and bytes, or neither; expected one of them")
        if size is None:
            inputs[spec.name] = spec.from_values(one["shape"], _listed(one["data"], f"the data of {spec.name!r}"))
            continue
        expected = math.prod(one["shape"]) * spec.datatype.dtype.itemsize
        if type(size) is not int or size != expected:
            raise RefusedRequestError(f"input {spec.name!r} has binary_data_size {size!r:.40}, expected {expected}")
        if len(rest) < size:
            raise RefusedRequestError(f"input {spec.name!r} is cut off: {len(rest)} bytes are left, expected {size}")
        inputs[spec.name] = spec.from_bytes(one["shape"], rest[:size])
        rest = rest[size:]
    if len(rest):
        raise RefusedRequestError(f"{len(rest)} bytes follow the last input; expected none")
    return inputs


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None and what.endswith("parameters"):
        return {}
    if not isinstance(value, dict):
        raise RefusedRequestError(f"{what} is {type(value).__name__}, expected an object")
    return value


def _listed(value: Any, what: str) -> list[Any]:
    if value is None and what == "outputs":
        return []
    if not isinstance(value, list):
        raise RefusedRequestError(f"{what} is {type(value).__name__}, expected a list")
    return value
