"""Inputs and outputs of a ranker as its ONNX graph declares them, and the checks of a request against them.

KServe decodes the tensors but compares them with nothing: ``InferInput.as_numpy`` casts 4.5 to an integer and parses
strings as numbers. The checks here reject such values. Nothing is cast, padded or truncated to fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from reelway.platform.errors import IncompatibleReleaseError
from reelway.serving.open_inference.errors import InferenceRequestError, RequestTooLargeError

Array = NDArray[Any]

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_ONNX_DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
_SOURCE_KINDS: Final = {"b": "b", "i": "iu", "f": "iuf"}
"""NumPy kind of an input -> kinds of the values it accepts. An integer is a valid float, and nothing else is cast."""
_JSON_NUMBER_TYPES: Final = frozenset({int, float, type(None)})


class InputTensor(Protocol):
    """The parts of ``kserve.InferInput`` that are read here."""

    @property
    def name(self) -> Any: ...
    @property
    def datatype(self) -> Any: ...
    @property
    def shape(self) -> Any: ...
    @property
    def data(self) -> Any: ...
    def as_numpy(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the graph. A string in ``shape`` names an axis whose size the request chooses."""

    name: str
    datatype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of_graph(cls, name: str, onnx_type: str, shape: Sequence[int | str | None]) -> TensorSpec:
        """Converts a declaration of ONNX Runtime.

        Raises:
            IncompatibleReleaseError: if the protocol has no datatype for the tensor's type.
        """
        if onnx_type not in _ONNX_DATATYPES:
            raise IncompatibleReleaseError(f"{name} is {onnx_type}, expected one of {sorted(_ONNX_DATATYPES)}")
        named = (f"{name}.{axis}" if size is None else size for axis, size in enumerate(shape))
        return cls(name, _ONNX_DATATYPES[onnx_type], tuple(named))

    @property
    def dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.datatype]

    def metadata(self) -> dict[str, Any]:
        """Returns the protocol's metadata; -1 is an axis whose size the request chooses."""
        shape = [size if isinstance(size, int) else -1 for size in self.shape]
        return {"name": self.name, "datatype": self.datatype, "shape": shape}

    def read(self, tensor: InputTensor) -> Array:
        """Returns the tensor's data. JSON ``null`` is NaN, because JSON has no other literal for a missing number.

        Raises:
            InferenceRequestError: if the data do not have this datatype or the tensor's shape.
        """
        if tensor.data is not None and not isinstance(tensor.data, list):
            raise InferenceRequestError(
                f"input {self.name!r}: the data are of type {type(tensor.data).__name__}, expected a list"
            )
        if tensor.data:
            self._check_values(tensor.data, tensor.shape)
        try:
            return tensor.as_numpy()
        except (ValueError, TypeError, OverflowError) as error:
            raise InferenceRequestError(
                f"input {self.name!r}: the data are not {self.datatype} of shape {list(tensor.shape)}: {error}"
            ) from error

    def _check_values(self, values: Any, shape: Sequence[int]) -> None:
        dtype = self.dtype
        try:
            actual = np.asarray(values)
            if dtype.kind == "f" and actual.dtype == object and {type(v) for v in actual.flat} <= _JSON_NUMBER_TYPES:
                actual = actual.astype(np.float64)
        except (ValueError, OverflowError):
            actual = np.asarray(None)
        if actual.dtype.kind not in _SOURCE_KINDS[dtype.kind]:
            raise InferenceRequestError(f"input {self.name!r}: the data have values that are not {self.datatype}")
        if actual.size != math.prod(shape) or (actual.ndim > 1 and actual.shape != tuple(shape)):
            raise InferenceRequestError(
                f"input {self.name!r}: the data have shape {list(actual.shape)}, expected {math.prod(shape)} values "
                f"for shape {list(shape)}"
            )


@dataclass(frozen=True)
class ModelSignature:
    """All inputs and outputs of a graph.

    Args:
        max_candidates: largest size of an axis whose size the request chooses.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_candidates: int

    def read_inputs(self, tensors: Sequence[InputTensor]) -> dict[str, Array]:
        """Returns the data of each input. All names, datatypes and shapes are checked before any data are read.

        Raises:
            InferenceRequestError: if an input does not fit the graph.
        """
        specs = {spec.name: spec for spec in self.inputs}
        names: set[str] = set()
        axes: dict[str, tuple[int, str]] = {}
        for tensor in tensors:
            if not isinstance(tensor.name, str) or tensor.name not in specs:
                raise InferenceRequestError(f"there is no input {_short(tensor.name)}; expected {', '.join(specs)}")
            if tensor.name in names:
                raise InferenceRequestError(f"input {tensor.name!r} is given twice")
            names.add(tensor.name)
            self._check_declaration(specs[tensor.name], tensor, axes)
        if missing := [name for name in specs if name not in names]:
            raise InferenceRequestError(f"missing inputs: {', '.join(missing)}")
        return {tensor.name: specs[tensor.name].read(tensor) for tensor in tensors}

    def requested_outputs(self, names: Iterable[Any]) -> list[TensorSpec]:
        """Returns the outputs with these names, or all outputs if there are no names."""
        specs = {spec.name: spec for spec in self.outputs}
        chosen = list(names)
        for name in chosen:
            if not isinstance(name, str) or name not in specs:
                raise InferenceRequestError(f"there is no output {_short(name)}; expected {', '.join(specs)}")
        return [specs[name] for name in dict.fromkeys(chosen)] or list(self.outputs)

    def zero_inputs(self, candidates: int) -> Mapping[str, Array]:
        sizes = {
            spec.name: [size if isinstance(size, int) else candidates for size in spec.shape] for spec in self.inputs
        }
        return {spec.name: np.zeros(sizes[spec.name], dtype=spec.dtype) for spec in self.inputs}

    def _check_declaration(self, spec: TensorSpec, tensor: InputTensor, axes: dict[str, tuple[int, str]]) -> None:
        if tensor.datatype != spec.datatype:
            raise InferenceRequestError(
                f"input {spec.name!r} has datatype {_short(tensor.datatype)}, expected {spec.datatype}"
            )
        shape = tensor.shape
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise InferenceRequestError(f"input {spec.name!r} has shape {_short(shape)}, expected a list of integers")
        expected = spec.metadata()["shape"]
        fits = len(shape) == len(expected) and all(e in (-1, s) for s, e in zip(shape, expected, strict=True))
        if not fits or min(shape, default=1) < 1:
            raise InferenceRequestError(
                f"input {spec.name!r} has shape {_short(shape)}, expected {expected} where -1 is at least 1"
            )
        for axis, size in zip(spec.shape, shape, strict=True):
            if isinstance(axis, int):
                continue
            if size > self.max_candidates:
                raise RequestTooLargeError(
                    f"input {spec.name!r} has {size} rows, expected at most {self.max_candidates}"
                )
            first_size, first_name = axes.setdefault(axis, (size, spec.name))
            if first_size != size:
                raise InferenceRequestError(
                    f"input {spec.name!r} has {size} {axis}, expected {first_size} as in {first_name!r}"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
