"""What a ranker takes is said by its graph: everything else is refused with the name and what was expected."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.platform.errors import IncompatibleReleaseError
from reelway.serving.open_inference.json_tensors import parse_request, write_answer
from reelway.serving.open_inference.refusals import RefusedRequestError, TooLargeError
from reelway.serving.open_inference.tensors import Declared, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec.of_graph("viewer", "tensor(float)", (1, 3)),
        TensorSpec.of_graph("codes", "tensor(int64)", ("candidates", 2)),
        TensorSpec.of_graph("videos", "tensor(float)", ("candidates", 2)),
    ),
    outputs=(TensorSpec.of_graph("outputs", "tensor(float)", ("candidates", 4)),),
    candidates=100,
)
RIGHT = {
    "viewer": {"name": "viewer", "datatype": "FP32", "shape": [1, 3], "data": [0.5, 1, 2]},
    "codes": {"name": "codes", "datatype": "INT64", "shape": [2, 2], "data": [[1, 2], [3, 4]]},
    "videos": {"name": "videos", "datatype": "FP32", "shape": [2, 2], "data": [1.5, 2.5, 3.5, 4.5]},
}


def request(**changes: dict[str, Any] | None) -> dict[str, Any]:
    """A right request with some inputs changed, or left out."""
    inputs = {**RIGHT, **{name: change and {**RIGHT.get(name, {}), **change} for name, change in changes.items()}}
    return {"inputs": [one for one in inputs.values() if one is not None]}


def parse(document: Any, binary: bytes = b"") -> Any:
    text = json.dumps(document).encode()
    return parse_request(text + binary, str(len(text)) if binary else None, SIGNATURE)


def test_metadata_is_the_graphs_own_with_open_axes_as_minus_one() -> None:
    assert SIGNATURE.inputs[1].metadata() == {"name": "codes", "datatype": "INT64", "shape": [-1, 2]}
    assert SIGNATURE.inputs[0].metadata() == {"name": "viewer", "datatype": "FP32", "shape": [1, 3]}


def test_null_is_a_missing_number() -> None:
    assert np.isnan(parse(request(videos={"data": [[1, None], [3, 4]]})).inputs["videos"]).tolist() == [
        [False, True], [False, False]
    ]  # fmt: skip


def test_a_graph_of_another_type_is_refused() -> None:
    with pytest.raises(IncompatibleReleaseError, match="words is tensor"):
        TensorSpec.of_graph("words", "tensor(string)", (1,))


def test_lists_flat_and_nested_and_bytes_are_the_same_tensors() -> None:
    asked = parse(request())
    assert asked.inputs["codes"].tolist() == [[1, 2], [3, 4]]
    assert asked.inputs["videos"].dtype == np.float32
    codes = asked.inputs["codes"].tobytes()
    binary = {"parameters": {"binary_data_size": len(codes)}, "data": None}
    assert np.array_equal(parse(request(codes=binary), codes).inputs["codes"], asked.inputs["codes"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"videos": None}, "missing inputs: videos"),
        ({"more": {"name": "more", "datatype": "FP32", "shape": [1], "data": [1]}}, "no input 'more'"),
        ({"twice": RIGHT["codes"]}, "'codes' is given twice"),
        ({"videos": {"name": 7}}, "no input 7"),
        ({"videos": {"name": ["videos"]}}, "no input"),
        ({"videos": {"datatype": "FP64"}}, "'videos' is said to be 'FP64', expected FP32"),
        ({"videos": {"datatype": None}}, "'videos' is said to be None"),
        ({"videos": {"shape": [2, 3]}}, "'videos' has shape [2, 3], expected [-1, 2]"),
        ({"videos": {"shape": [4]}}, "'videos' has shape [4]"),
        ({"videos": {"shape": [0, 2], "data": []}}, "'videos' has shape [0, 2]"),
        ({"videos": {"shape": [-1, 2]}}, "'videos' has shape [-1, 2]"),
        ({"videos": {"shape": [True, 2]}}, "expected whole numbers"),
        ({"videos": {"shape": [2.0, 2]}}, "expected whole numbers"),
        ({"videos": {"shape": "22"}}, "expected whole numbers"),
        ({"videos": {"shape": None}}, "expected whole numbers"),
        ({"videos": {"shape": [1, 2], "data": [1, 2]}}, "'videos' has 1 candidates, expected 2 as in 'codes'"),
        ({"videos": {"data": [1, 2, 3]}}, "'videos' has data of shape [3], expected 4 values"),
        ({"videos": {"data": [[1, 2, 3, 4]]}}, "'videos' has data of shape [1, 4]"),
        ({"videos": {"data": [[1, 2], [3]]}}, "values that are not FP32"),
        ({"videos": {"data": ["1", "2", "3", "4"]}}, "values that are not FP32"),
        ({"codes": {"data": [1, None, 3, 4]}}, "values that are not INT64"),
        ({"videos": {"data": ["1", None, 3, 4]}}, "values that are not FP32"),
        ({"videos": {"data": [10**400, None, 3, 4]}}, "values that are not FP32"),
        ({"codes": {"data": [1, 2, 3, 4.5]}}, "values that are not INT64"),
        ({"codes": {"data": [1, 2, 3, 2**70]}}, "values that are not INT64"),
        ({"codes": {"data": [1, 2, 3, 2**63]}}, "INT64"),
        ({"videos": {"data": None}}, "data and bytes, or neither"),
        ({"videos": {"parameters": {"binary_data_size": 16}}}, "data and bytes, or neither"),
        ({"videos": {"parameters": [1]}}, "parameters is list, expected an object"),
        ({"videos": {"data": {"0": 1}}}, "the data of 'videos' is dict, expected a list"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedRequestError) as refusal:
        parse(request(**change))
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("body", "length", "reason"),
    [
        (b"", None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b"\xff\xfe{}", None, "not JSON"),
        (b"[]", None, "the request is list, expected an object"),
        (b"{}", None, "inputs is NoneType, expected a list"),
        (b'{"inputs": 1}', None, "inputs is int"),
        (b'{"inputs": [1]}', None, "an input is int"),
        (b'{"inputs": [], "id": 7}', None, "the id is not a string"),
        (b'{"inputs": [], "outputs": [{"name": "logits"}]}', None, "no output 'logits'; expected outputs"),
        (b"{}", "3", "expected at most the body's 2 bytes"),
        (b"{}", "-1", "expected at most"),
        (b"{}", "two", "expected at most"),
        (b"{}", "٣", "expected at most"),
        (b"{}", "9" * 5000, "expected at most"),
    ],
)
def test_malformed_body_is_rejected(body: bytes, length: str | None, reason: str) -> None:
    with pytest.raises(RefusedRequestError) as refusal:
        parse_request(body, length, SIGNATURE)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("size", "binary", "reason"),
    [
        (32, b"x" * 31, "'codes' is cut off: 31 bytes are left, expected 32"),
        (32, b"x" * 33, "1 bytes follow the last input"),
        (31, b"x" * 31, "binary_data_size 31, expected 32"),
        (-32, b"x" * 32, "binary_data_size -32, expected 32"),
        ("32", b"x" * 32, "binary_data_size '32', expected 32"),
        (True, b"x" * 32, "binary_data_size True"),
    ],
)
def test_bytes_that_are_cut_off_or_too_many_are_refused(size: Any, binary: bytes, reason: str) -> None:
    with pytest.raises(RefusedRequestError) as refusal:
        parse(request(codes={"parameters": {"binary_data_size": size}, "data": None}), binary)
    assert reason in str(refusal.value)


def test_more_rows_than_allowed_are_too_large_before_any_data_is_looked_at() -> None:
    with pytest.raises(TooLargeError, match="has 101 rows, expected at most 100"):
        SIGNATURE.specs_of([Declared("codes", "INT64", [101, 2])])


def test_outputs_are_bytes_only_where_that_is_asked_for() -> None:
    values = {"outputs": np.arange(8, dtype=np.float32).reshape(2, 4)}
    text, length = write_answer(parse(request() | {"id": "a"}), values, {"model_name": "ranker"})
    assert length is None
    assert json.loads(text)["outputs"][0]["data"] == values["outputs"].ravel().tolist()
    assert json.loads(text)["id"] == "a"
    wanted = {"outputs": [{"name": "outputs", "parameters": {"binary_data": True}}]}
    for asked in (request() | wanted, request() | {"parameters": {"binary_data_output": True}}):
        body, length = write_answer(parse(asked), values, {})
        assert body[length:] == values["outputs"].tobytes()
        assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 32}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    place=st.sampled_from(["name", "datatype", "shape", "data", "parameters"]),
    name=st.sampled_from(sorted(RIGHT)),
    value=JSON,
    binary=st.binary(max_size=64),
)
def test_whatever_is_in_an_input_it_is_read_or_refused(place: str, name: str, value: Any, binary: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a number beyond FP32 is infinite in it
        try:
            asked = parse(request(**{name: {place: value}}), binary)
        except RefusedRequestError:
            return
    assert {tensor: array.shape for tensor, array in asked.inputs.items()} == {
        "viewer": (1, 3), "codes": (2, 2), "videos": (2, 2)
    }  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200), length=st.none() | st.integers(-5, 300).map(str) | st.text(max_size=6))
def test_whatever_bytes_come_they_are_refused_and_nothing_else(body: bytes, length: str | None) -> None:
    with pytest.raises(RefusedRequestError):
        parse_request(body, length, SIGNATURE)
