"""The ranker's signature against ``kserve.InferInput``, and the data plane's strict decoding."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kserve import InferInput, ModelRepository
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from tests.support.serving.rank_server import make_release

from reelway.platform.errors import IncompatibleReleaseError
from reelway.serving.open_inference.data_plane import LENGTH_HEADER, RankerDataPlane
from reelway.serving.open_inference.errors import InferenceRequestError, RequestTooLargeError
from reelway.serving.open_inference.ranker_service import RankerService
from reelway.serving.open_inference.tensors import ModelSignature, TensorSpec

SIGNATURE = ModelSignature(
    inputs=(
        TensorSpec.of_graph("viewer", "tensor(float)", (1, 3)),
        TensorSpec.of_graph("codes", "tensor(int64)", ("candidates", 2)),
        TensorSpec.of_graph("videos", "tensor(float)", ("candidates", 2)),
    ),
    outputs=(TensorSpec.of_graph("outputs", "tensor(float)", ("candidates", 4)),),
    max_candidates=100,
)
VALID = {
    "viewer": {"name": "viewer", "datatype": "FP32", "shape": [1, 3], "data": [0.5, 1, 2]},
    "codes": {"name": "codes", "datatype": "INT64", "shape": [2, 2], "data": [[1, 2], [3, 4]]},
    "videos": {"name": "videos", "datatype": "FP32", "shape": [2, 2], "data": [1.5, 2.5, 3.5, 4.5]},
}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> RankerDataPlane:
    service = RankerService(make_release(tmp_path_factory.mktemp("release")).ranker, CollectorRegistry())
    return RankerDataPlane(ModelRepository(), service)


def request(**changes: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a valid request with some inputs changed, or left out."""
    inputs = {**VALID, **{name: change and {**VALID.get(name, {}), **change} for name, change in changes.items()}}
    return {"inputs": [tensor for tensor in inputs.values() if tensor is not None]}


def decode(plane: RankerDataPlane, document: Any, binary: bytes = b"") -> Any:
    text = json.dumps(document).encode()
    return plane.decode(text + binary, {LENGTH_HEADER: str(len(text))}, "v2", "ranker")[0]


def read(plane: RankerDataPlane, document: Any, binary: bytes = b"") -> dict[str, Any]:
    return SIGNATURE.read_inputs(decode(plane, document, binary).inputs)


def test_metadata_shows_an_open_axis_as_minus_one() -> None:
    assert SIGNATURE.inputs[1].metadata() == {"name": "codes", "datatype": "INT64", "shape": [-1, 2]}
    assert SIGNATURE.inputs[0].metadata() == {"name": "viewer", "datatype": "FP32", "shape": [1, 3]}


def test_null_is_a_missing_number(plane: RankerDataPlane) -> None:
    values = read(plane, request(videos={"data": [[1, None], [3, 4]]}))["videos"]
    assert np.isnan(values).tolist() == [[False, True], [False, False]]


def test_onnx_type_without_a_datatype_is_rejected() -> None:
    with pytest.raises(IncompatibleReleaseError, match="words is tensor"):
        TensorSpec.of_graph("words", "tensor(string)", (1,))


def test_flat_lists_nested_lists_and_bytes_are_the_same_tensors(plane: RankerDataPlane) -> None:
    inputs = read(plane, request())
    assert inputs["codes"].tolist() == [[1, 2], [3, 4]]
    assert inputs["videos"].dtype == np.float32
    codes = inputs["codes"].tobytes()
    binary = {"parameters": {"binary_data_size": len(codes)}, "data": None}
    assert np.array_equal(read(plane, request(codes=binary), codes)["codes"], inputs["codes"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"videos": None}, "missing inputs: videos"),
        ({"more": {"name": "more", "datatype": "FP32", "shape": [1], "data": [1]}}, "no input 'more'"),
        ({"twice": VALID["codes"]}, "'codes' is given twice"),
        ({"videos": {"name": 7}}, "no input 7"),
        ({"videos": {"name": ["videos"]}}, "no input"),
        ({"videos": {"datatype": "FP64"}}, "'videos' has datatype 'FP64', expected FP32"),
        ({"videos": {"datatype": None}}, "the request is malformed: AttributeError"),
        ({"videos": {"shape": [2, 3]}}, "'videos' has shape [2, 3], expected [-1, 2]"),
        ({"videos": {"shape": [4]}}, "'videos' has shape [4]"),
        ({"videos": {"shape": [0, 2], "data": []}}, "'videos' has shape [0, 2]"),
        ({"videos": {"shape": [-1, 2]}}, "'videos' has shape [-1, 2]"),
        ({"videos": {"shape": [True, 2]}}, "expected a list of integers"),
        ({"videos": {"shape": [2.0, 2]}}, "expected a list of integers"),
        ({"videos": {"shape": "22"}}, "expected a list of integers"),
        ({"videos": {"shape": None}}, "expected a list of integers"),
        ({"videos": {"shape": [1, 2], "data": [1, 2]}}, "'videos' has 1 candidates, expected 2 as in 'codes'"),
        ({"videos": {"data": [1, 2, 3]}}, "'videos': the data have shape [3], expected 4 values"),
        ({"videos": {"data": [[1, 2, 3, 4]]}}, "'videos': the data have shape [1, 4]"),
        ({"videos": {"data": [[1, 2], [3]]}}, "values that are not FP32"),
        ({"videos": {"data": ["1", "2", "3", "4"]}}, "values that are not FP32"),
        ({"codes": {"data": [1, None, 3, 4]}}, "values that are not INT64"),
        ({"videos": {"data": ["1", None, 3, 4]}}, "values that are not FP32"),
        ({"videos": {"data": [10**400, None, 3, 4]}}, "not JSON: number is infinity"),
        ({"codes": {"data": [1, 2, 3, 4.5]}}, "values that are not INT64"),
        ({"codes": {"data": [1, 2, 3, 2**70]}}, "values that are not INT64"),
        ({"codes": {"data": [1, 2, 3, 2**63]}}, "values that are not INT64"),
        ({"videos": {"data": None}}, "needs either data or binary_data_size"),
        ({"videos": {"parameters": {"binary_data_size": 16}}}, "and not both"),
        ({"videos": {"parameters": [1]}}, "the request is malformed: AttributeError"),
        ({"videos": {"data": {"0": 1}}}, "the data are of type dict, expected a list"),
    ],
)
def test_input_that_does_not_fit_is_rejected_by_name(
    plane: RankerDataPlane, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InferenceRequestError) as refusal:
        read(plane, request(**change))
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("body", "length", "reason"),
    [
        (b"", "0", "not JSON"),
        (b"[" * 100_000, "100000", "not JSON"),
        (b"\xff\xfe{}", "4", "not JSON"),
        (b"[]", "2", "the request is malformed: TypeError"),
        (b"{}", "2", "the request is malformed: KeyError: 'inputs'"),
        (b'{"inputs": 1}', "13", "the request is malformed: TypeError"),
        (b'{"inputs": [1]}', "15", "the request is malformed: TypeError"),
        (b'{"inputs": [{}]}', "16", "the request is malformed: KeyError: 'name'"),
        (b"{}", None, "expected a number of bytes"),
        (b"{}", "3", "expected at most the body's 2 bytes"),
        (b"{}", "-1", "expected a number of bytes"),
        (b"{}", "two", "expected a number of bytes"),
        (b"{}", "٣", "expected a number of bytes"),
        (b"{}", "9" * 5000, "expected a number of bytes"),
    ],
)
def test_body_that_is_no_request_is_rejected(
    plane: RankerDataPlane, body: bytes, length: str | None, reason: str
) -> None:
    headers = {} if length is None else {LENGTH_HEADER: length}
    with pytest.raises(InferenceRequestError) as refusal:
        plane.decode(body, headers, "v2", "ranker")
    assert reason in str(refusal.value)


def test_unknown_output_is_rejected() -> None:
    with pytest.raises(InferenceRequestError, match="no output 'logits'; expected outputs"):
        SIGNATURE.requested_outputs(["logits"])
    assert SIGNATURE.requested_outputs([]) == list(SIGNATURE.outputs)


@pytest.mark.parametrize(
    ("size", "binary", "reason"),
    [
        (32, b"x" * 31, "by the sizes that it states"),
        (32, b"x" * 33, "by the sizes that it states"),
        (31, b"x" * 31, "'codes': the data are not INT64 of shape [2, 2]"),
        (40, b"x" * 40, "'codes': the data are not INT64 of shape [2, 2]"),
        (-32, b"x" * 32, "binary_data_size -32, expected bytes"),
        ("32", b"x" * 32, "binary_data_size '32', expected bytes"),
        (True, b"x" * 32, "binary_data_size True"),
    ],
)
def test_bytes_of_another_length_are_rejected(plane: RankerDataPlane, size: Any, binary: bytes, reason: str) -> None:
    with pytest.raises(InferenceRequestError) as refusal:
        read(plane, request(codes={"parameters": {"binary_data_size": size}, "data": None}), binary)
    assert reason in str(refusal.value)


def test_too_many_rows_are_rejected_before_any_data_are_read() -> None:
    with pytest.raises(RequestTooLargeError, match="has 101 rows, expected at most 100"):
        SIGNATURE.read_inputs([InferInput("codes", [101, 2], "INT64")])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    part=st.sampled_from(["name", "datatype", "shape", "data", "parameters"]),
    name=st.sampled_from(sorted(VALID)),
    value=JSON,
    binary=st.binary(max_size=64),
)
def test_any_input_is_read_or_rejected(plane: RankerDataPlane, part: str, name: str, value: Any, binary: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a number that FP32 cannot hold becomes infinite
        try:
            inputs = read(plane, request(**{name: {part: value}}), binary)
        except InferenceRequestError:
            return
    assert {tensor: array.shape for tensor, array in inputs.items()} == {
        "viewer": (1, 3), "codes": (2, 2), "videos": (2, 2)
    }  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(part=st.sampled_from(["datatype", "shape", "data"]), name=st.sampled_from(sorted(VALID)), value=JSON)
def test_any_json_input_is_read_or_rejected(plane: RankerDataPlane, part: str, name: str, value: Any) -> None:
    """KServe decodes a request without binary tensors by pydantic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            decoded = InferenceRequest.model_validate_json(json.dumps(request(**{name: {part: value}})))
            inputs = SIGNATURE.read_inputs(plane.decode(decoded, {}, "v2", "ranker")[0].inputs)
        except (InferenceRequestError, ValidationError):
            return
    assert inputs[name].shape == tuple(VALID[name]["shape"])


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200), length=st.none() | st.integers(-5, 300).map(str) | st.text(max_size=6))
def test_random_bytes_are_rejected(plane: RankerDataPlane, body: bytes, length: str | None) -> None:
    with pytest.raises(InferenceRequestError):
        plane.decode(body, {} if length is None else {LENGTH_HEADER: length}, "v2", "ranker")
