"""Exports the models as ONNX graphs and compares each graph with torch on the caller's rows.

A graph holds weights and constants, no pickle and no Python. The ranker's position tower is not part of it.
"""

# Shapes: B viewers, C candidates or videos, D embedding, K tasks, L history

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from reelway.pipelines.models.inference_ranker import InferenceRanker
from reelway.pipelines.models.ranker import Ranker
from reelway.pipelines.models.two_tower import TwoTower
from reelway.pipelines.training.batches import as_tensor
from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.feature_dimensions import video_tower_inputs
from reelway.platform.contracts.feature_names import RANKER_INPUTS, VIEWER_TOWER_INPUTS
from reelway.platform.errors import ReleaseError
from reelway.platform.features.assembly import VideoArrays, ViewerArrays

MAX_OUTPUT_DIFFERENCE: Final = 1e-4
OPSET: Final = 18
VIEWER_OUTPUT: Final = "viewer_embedding"
VIDEO_OUTPUT: Final = "video_embedding"
RANKER_OUTPUT: Final = "outputs"

Arrays = Mapping[str, NDArray[Any]]


def export_viewer_tower(model: TwoTower, path: Path, sample: ViewerArrays) -> float:
    """Writes ``viewer_tower.onnx``: ``VIEWER_TOWER_INPUTS [B, ...] -> viewer_embedding [B, D]``, any B.

    Args:
        sample: real rows, with histories of the data set's ``history_length``.

    Returns:
        The largest absolute difference from torch over the sample.

    Raises:
        ReleaseError: if the difference exceeds ``MAX_OUTPUT_DIFFERENCE``, or the sample is empty or of another length.
    """
    length = sample.history_codes.shape[1]
    if length != (expected := model.dimensions.history_length):
        raise ReleaseError(f"sample histories hold {length} videos, expected {expected}, as serving sends them")
    inputs = {name: getattr(sample, name) for name in VIEWER_TOWER_INPUTS}
    shapes = {name: {0: "B"} for name in VIEWER_TOWER_INPUTS}
    return _export(model.viewer_tower, path, inputs, shapes, VIEWER_OUTPUT)


def export_video_tower(model: TwoTower, path: Path, sample: VideoArrays) -> float:
    """Writes ``video_tower.onnx``: ``video_tower_inputs(dimensions) [C, ...] -> video_embedding [C, D]``, any C.

    Args:
        sample: real videos.

    Returns and raises the same as ``export_viewer_tower``.
    """
    names = video_tower_inputs(model.dimensions)
    inputs = {name: getattr(sample, name) for name in names}
    return _export(model.video_tower, path, inputs, {name: {0: "C"} for name in names}, VIDEO_OUTPUT)


def export_ranker(model: Ranker, path: Path, sample: Arrays) -> float:
    """Writes ``ranker.onnx``: ``RANKER_INPUTS -> outputs [C, K]``, viewer inputs ``[1, ...]``, any C.

    The graph is the inference form (``models.inference_ranker``); it is compared with the trained model.

    Args:
        sample: one real viewer and its candidates, from ``inference.ranker_inputs``.

    Returns and raises the same as ``export_viewer_tower``.
    """
    inputs = {name: sample[name] for name in RANKER_INPUTS}
    if viewers := {name for name in RANKER_INPUTS[:3] if len(inputs[name]) != 1}:
        raise ReleaseError(f"sample inputs {sorted(viewers)}: more than one viewer; pass one, as in a request")
    shapes = {name: {} if name in RANKER_INPUTS[:3] else {0: "C"} for name in RANKER_INPUTS}
    return _export(InferenceRanker(model), path, inputs, shapes, RANKER_OUTPUT, model)


def _export(
    module: nn.Module,
    path: Path,
    inputs: Arrays,
    dynamic: dict[str, dict[int, str]],
    output: str,
    trained: nn.Module | None = None,
) -> float:
    """Writes ``module`` and compares the file with ``trained``, by default the module itself."""
    rows = max(len(values) for values in inputs.values())
    if not rows:
        raise ReleaseError(f"{path.name}: no sample rows to compare with torch; pass at least one")
    trained = trained or module
    trained.eval()
    module.eval()
    # Exported from at least two rows: torch.export takes a dimension of one for a constant.
    example = {
        name: as_tensor(values if not dynamic[name] or rows > 1 else np.repeat(values, 2, axis=0))
        for name, values in inputs.items()
    }
    with atomic_file(path) as aside:
        _write(module, example, aside, dynamic, output)
        difference = _largest_difference(trained, aside, inputs, output)
        if not difference <= MAX_OUTPUT_DIFFERENCE:
            raise ReleaseError(
                f"{path.name}: ONNX Runtime differs from torch by {difference:.3g} over {rows} rows, expected at most "
                f"{MAX_OUTPUT_DIFFERENCE:g}; the release would rank differently than evaluated, so nothing was written"
            )
    return difference


def _write(
    module: nn.Module,
    example: dict[str, torch.Tensor],
    path: Path,
    dynamic: dict[str, dict[int, str]],
    output: str,
) -> None:
    dims = {label: torch.export.Dim(label, min=1, max=1 << 20) for axes in dynamic.values() for label in axes.values()}
    shapes = {name: {axis: dims[label] for axis, label in dynamic[name].items()} for name in example}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            module,
            (),
            str(path),
            kwargs=example,
            input_names=list(example),
            output_names=[output],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            optimize=True,
            verbose=False,
        )


def _largest_difference(module: nn.Module, path: Path, inputs: Arrays, output: str) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    types = {declared.name: declared.type for declared in session.get_inputs()}
    if set(types) != set(inputs):
        raise ReleaseError(f"{path.name}: the graph takes {sorted(types)}, expected {sorted(inputs)}")
    feed = {name: values.astype(np.int64 if "int64" in types[name] else np.float32) for name, values in inputs.items()}
    (actual,) = session.run([output], feed)
    with torch.inference_mode():
        expected = module(**{name: as_tensor(values) for name, values in inputs.items()}).numpy()
    if actual.shape != expected.shape:
        raise ReleaseError(f"{path.name}: ONNX Runtime gives shape {actual.shape}, torch {expected.shape}")
    return float(np.abs(actual - expected).max())
