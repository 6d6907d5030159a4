"""Loads ONNX models into ONNX Runtime: one thread per call, no spinning, inputs checked by name.

Several threads per model would make replicas compete for cores; a deployment is scaled by its replicas instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from reelway.platform.errors import IncompatibleReleaseError, ServingError

F32 = NDArray[np.float32]


class TensorInfo(NamedTuple):
    """The declaration of a model's input or output. A dynamic axis has a name or None instead of a size."""

    name: str
    onnx_type: str
    shape: tuple[int | str | None, ...]


class OnnxModel:
    """A loaded ONNX model with one output.

    Args:
        path: the ``.onnx`` file.
        inputs: names that the model may take; the export drops inputs that the model does not use.
        threads: number of threads of one run.

    Raises:
        IncompatibleReleaseError: if the file is not an ONNX model, or the model takes other inputs.
    """

    def __init__(self, path: Path, *, inputs: Sequence[str], threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise IncompatibleReleaseError(
                f"{path}: ONNX Runtime cannot load it: {error}; rebuild the release"
            ) from error
        self._name = path.name
        self._inputs = tuple(node.name for node in self._session.get_inputs())
        if unknown := sorted(set(self._inputs) - set(inputs)):
            raise IncompatibleReleaseError(
                f"{path}: takes inputs {unknown}, expected only {sorted(inputs)}; rebuild the release"
            )
        self._output = self._session.get_outputs()[0].name

    def tensors(self) -> tuple[list[TensorInfo], list[TensorInfo]]:
        """Returns the declared inputs and outputs."""
        return (
            [TensorInfo(node.name, node.type, tuple(node.shape)) for node in self._session.get_inputs()],
            [TensorInfo(node.name, node.type, tuple(node.shape)) for node in self._session.get_outputs()],
        )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> F32:
        """Returns the model's output.

        Raises:
            ServingError: if the output is not finite; candidates cannot be ordered by such values.
        """
        (output,) = self._session.run([self._output], {name: inputs[name] for name in self._inputs})
        result: F32 = output
        if not np.isfinite(result).all():
            raise ServingError(
                f"{self._name}: the output has values that are not finite; check the ranges of the inputs"
            )
        return result
