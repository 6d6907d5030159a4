"""Exported graphs in ONNX Runtime, opened one way: one thread each, no spinning, inputs checked by name.

More than one thread per graph makes replicas fight over cores; a deployment scales by replicas instead.
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


class Tensor(NamedTuple):
    """One input or output as a graph declares it; an axis that the caller chooses has a name or None."""

    name: str
    onnx_type: str
    shape: tuple[int | str | None, ...]


class Graph:
    """One loaded graph with one output.

    Args:
        path: the ``.onnx`` file.
        inputs: names that the graph may take; one that its export found unused may be absent.
        threads: of one run.

    Raises:
        IncompatibleReleaseError: not a graph, or a graph with other inputs.
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
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise IncompatibleReleaseError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        self._name = path.name
        self._inputs = tuple(node.name for node in self._session.get_inputs())
        if unknown := sorted(set(self._inputs) - set(inputs)):
            raise IncompatibleReleaseError(f"{path}: takes inputs {unknown}, expected only {sorted(inputs)}")
        self._output = self._session.get_outputs()[0].name

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs as the graph declares them."""
        return (
            [Tensor(node.name, node.type, tuple(node.shape)) for node in self._session.get_inputs()],
            [Tensor(node.name, node.type, tuple(node.shape)) for node in self._session.get_outputs()],
        )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> F32:
        """The graph's output.

        Raises:
            ServingError: the output is not finite, so nothing may be ordered by it.
        """
        (output,) = self._session.run([self._output], {name: inputs[name] for name in self._inputs})
        result: F32 = output
        if not np.isfinite(result).all():
            raise ServingError(f"{self._name}: its output has values that are not finite; see the inputs' ranges")
        return result
