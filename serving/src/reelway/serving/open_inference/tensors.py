"""Why: what a ranker takes is said by its graph, and everything that does not fit is refused here, by name.

Checks come before data: names, datatypes and shapes are compared first, so that a wrong request costs no copy. Nothing
is cast, padded or cut to fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.errors import IncompatibleReleaseError
from reelway.serving.open_inference.refusals import RefusedRequestError, TooLargeError

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Datatype:
    """One of the protocol's datatypes. ``contents`` is where gRPC puts values that are not raw."""

    name: str
    dtype: np.dtype[Any]
    contents: str


_DATATYPES: Final = tuple(
    Datatype(name, np.dtype(dtype), contents)
    for name, dtype, contents in (
        ("BOOL", "?", "bool_contents"),
        ("INT32", "<i4", "int_contents"),
        ("INT64", "<i8", "int64_contents"),
        ("FP32", "<f4", "fp32_contents"),
        ("FP64", "<f8", "fp64_contents"),
    )
)
_OF_ONNX: Final = dict(
    zip(("tensor(bool)", "tensor(int32)", "tensor(int64)", "tensor(float)", "tensor(double)"), _DATATYPES, strict=True)
)
_KINDS: Final = {"b": "b", "i": "iu", "f": "iuf"}
"""What a list of values may be made of, by what it is to become: a whole number is a number, nothing else is cast."""
_NUMBERS_OR_NULL: Final = frozenset({int, float, type(None)})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as the graph declares it; a word in ``shape`` is an axis that the request chooses."""

    name: str
    datatype: Datatype
    shape: tuple[int | str, ...]

    @classmethod
    def of_graph(cls, name: str, onnx_type: str, shape: Sequence[int | str | None]) -> TensorSpec:
        """From what ONNX Runtime says. Raises IncompatibleReleaseError: a type that is not served here."""
        if onnx_type not in _OF_ONNX:
            raise IncompatibleReleaseError(f"{name} is {onnx_type}, expected one of {sorted(_OF_ONNX)}")
        named = (f"{name}.{axis}" if size is None else size for axis, size in enumerate(shape))
        return cls(name, _OF_ONNX[onnx_type], tuple(named))

    def metadata(self) -> dict[str, Any]:
        """As the protocol's metadata has it: -1 is an axis that the request chooses."""
        shape = [size if isinstance(size, int) else -1 for size in self.shape]
        return {"name": self.name, "datatype": self.datatype.name, "shape": shape}

    def from_bytes(self, shape: Sequence[int], data: bytes | memoryview) -> Array:
        """The tensor from its raw bytes, little-endian, row by row; it stays where it is."""
        expected = math.prod(shape) * self.datatype.dtype.itemsize
        if len(data) != expected:
            raise RefusedRequestError(
                f"input {self.name!r} has {len(data)} bytes, expected {expected} for {self.datatype.name} of shape "
                f"{list(shape)}"
            )
        return np.frombuffer(data, dtype=self.datatype.dtype).reshape(shape)

    def from_values(self, shape: Sequence[int], values: Any) -> Array:
        """The tensor from a list of values, flat or nested; null is NaN, which JSON has no other word for."""
        wanted = self.datatype.dtype
        try:
            found = np.asarray(values)
            if wanted.kind == "f" and found.dtype == object and {type(v) for v in found.flat} <= _NUMBERS_OR_NULL:
                found = found.astype(np.float64)
        except (ValueError, OverflowError):
            found = np.asarray(None)
        if found.size and found.dtype.kind not in _KINDS[wanted.kind]:
            raise RefusedRequestError(f"input {self.name!r} has values that are not {self.datatype.name} in its data")
        if found.size != math.prod(shape) or (found.ndim > 1 and found.shape != tuple(shape)):
            raise RefusedRequestError(
                f"input {self.name!r} has data of shape {list(found.shape)}, expected {math.prod(shape)} values for "
                f"shape {list(shape)}"
            )
        if wanted.kind == "i" and found.size:
            limits = np.iinfo(wanted)
            if int(found.min()) < limits.min or int(found.max()) > limits.max:
                raise RefusedRequestError(f"input {self.name!r} has values outside of {self.datatype.name}")
        return np.ascontiguousarray(found, dtype=wanted).reshape(shape)


@dataclass(frozen=True, slots=True)
class Declared:
    """What a request says of one of its inputs, before its data is looked at."""

    name: Any
    datatype: Any
    shape: Any


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives.

    Args:
        candidates: the most that an axis may have which the request chooses.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    candidates: int

    def specs_of(self, declared: Sequence[Declared]) -> list[TensorSpec]:
        """The spec of each declared input, in their order.

        Raises:
            RefusedRequestError: names, datatypes or shapes are not those of the graph, each with what was expected.
        """
        specs = {spec.name: spec for spec in self.inputs}
        seen: set[str] = set()
        axes: dict[str, tuple[int, str]] = {}
        for one in declared:
            if not isinstance(one.name, str) or one.name not in specs:
                raise RefusedRequestError(f"there is no input {_short(one.name)}; expected {', '.join(specs)}")
            if one.name in seen:
                raise RefusedRequestError(f"input {one.name!r} is given twice")
            seen.add(one.name)
            self._check(specs[one.name], one, axes)
        if missing := [name for name in specs if name not in seen]:
            raise RefusedRequestError(f"missing inputs: {', '.join(missing)}")
        return [specs[one.name] for one in declared]

    def requested(self, names: Iterable[Any]) -> list[TensorSpec]:
        """The outputs that are asked for; all when none is named."""
        specs = {spec.name: spec for spec in self.outputs}
        chosen = list(names)
        for name in chosen:
            if not isinstance(name, str) or name not in specs:
                raise RefusedRequestError(f"there is no output {_short(name)}; expected {', '.join(specs)}")
        return [specs[name] for name in dict.fromkeys(chosen)] or list(self.outputs)

    def nothing(self, candidates: int) -> Mapping[str, Array]:
        """Inputs of zeros, for a first call."""
        sizes = {
            spec.name: [size if isinstance(size, int) else candidates for size in spec.shape] for spec in self.inputs
        }
        return {spec.name: np.zeros(sizes[spec.name], dtype=spec.datatype.dtype) for spec in self.inputs}

    def _check(self, spec: TensorSpec, one: Declared, axes: dict[str, tuple[int, str]]) -> None:
        if one.datatype != spec.datatype.name:
            raise RefusedRequestError(
                f"input {spec.name!r} is said to be {_short(one.datatype)}, expected {spec.datatype.name}"
            )
        shape = one.shape
        if not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
            raise RefusedRequestError(f"input {spec.name!r} has shape {_short(shape)}, expected whole numbers")
        expected = spec.metadata()["shape"]
        fits = len(shape) == len(expected) and all(e in (-1, s) for s, e in zip(shape, expected, strict=True))
        if not fits or min(shape, default=1) < 1:
            raise RefusedRequestError(
                f"input {spec.name!r} has shape {_short(list(shape))}, expected {expected} where -1 is at least 1"
            )
        for axis, size in zip(spec.shape, shape, strict=True):
            if isinstance(axis, int):
                continue
            if size > self.candidates:
                raise TooLargeError(f"input {spec.name!r} has {size} rows, expected at most {self.candidates}")
            before, name = axes.setdefault(axis, (size, spec.name))
            if before != size:
                raise RefusedRequestError(f"input {spec.name!r} has {size} {axis}, expected {before} as in {name!r}")


def _short(seen: Any) -> str:
    text = repr(seen)
    return text if len(text) <= 80 else text[:77] + "..."
