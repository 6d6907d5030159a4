"""Dimensions of a release's ONNX graphs and index, read from the files.

ONNX Runtime and FAISS are imported only when a file is read, because storing and signing releases need neither. A
process without them passes another reader to ``verify``, for example one that queries a serving replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelway.platform.contracts.feature_dimensions import video_tower_inputs
from reelway.platform.contracts.feature_names import RANKER_INPUTS, VIEWER_TOWER_INPUTS
from reelway.platform.contracts.manifest import (
    INDEX_FILE,
    RANKER_FILE,
    VIDEO_TOWER_FILE,
    VIEWER_TOWER_FILE,
    Dimensions,
)
from reelway.platform.errors import IncompatibleReleaseError, ReleaseError

_INSTALL = (
    "install it with `pip install 'reelway-platform[verify]'`, or run `verify` in an environment with reelway-serving"
)


@dataclass(frozen=True)
class GraphShape:
    """Width (last axis) of every input and of the first output; ``None`` for a dynamic axis."""

    inputs: Mapping[str, int | None]
    output: int | None


@dataclass(frozen=True)
class FileDimensions:
    """Dimensions read from the graphs and the index."""

    viewer_tower: GraphShape
    video_tower: GraphShape
    ranker: GraphShape
    index_width: int
    index_rows: int
    index_is_inner_product: bool


DimensionReader = Callable[[Path], FileDimensions]
"""Reads the dimensions of a release folder; ``read_dimensions`` opens the files in this process."""


def read_dimensions(folder: Path) -> FileDimensions:
    """Opens all graphs and the index of a release folder.

    Raises:
        ReleaseError: if ONNX Runtime or FAISS is not installed.
        IncompatibleReleaseError: if a file does not have the expected format.
    """
    width, rows, inner_product = _read_index(folder / INDEX_FILE)
    return FileDimensions(
        viewer_tower=_read_graph(folder / VIEWER_TOWER_FILE),
        video_tower=_read_graph(folder / VIDEO_TOWER_FILE),
        ranker=_read_graph(folder / RANKER_FILE),
        index_width=width,
        index_rows=rows,
        index_is_inner_product=inner_product,
    )


def dimension_mismatches(declared: Dimensions, in_files: FileDimensions) -> list[str]:
    """Returns one sentence for every difference between the manifest and the files; empty if there is none."""
    tower, videos, ranker = in_files.viewer_tower, in_files.video_tower, in_files.ranker
    content = {name: width for name, width in declared.features.content.items() if width}
    problems = [
        *_input_mismatches(VIEWER_TOWER_FILE, tower, VIEWER_TOWER_INPUTS),
        *_input_mismatches(VIDEO_TOWER_FILE, videos, video_tower_inputs(declared.features)),
        *_input_mismatches(RANKER_FILE, ranker, RANKER_INPUTS),
    ]
    expected = [
        (f"{VIEWER_TOWER_FILE}: width of its output", tower.output, declared.embedding),
        (f"{VIEWER_TOWER_FILE}: width of viewer_dense", tower.inputs.get("viewer_dense"), declared.viewer_dense),
        *(
            (f"{VIEWER_TOWER_FILE}: width of {name}", tower.inputs.get(name), declared.features.history_length)
            for name in ("history_weights", "history_age_h")
        ),
        (f"{VIDEO_TOWER_FILE}: width of its output", videos.output, declared.embedding),
        *((f"{VIDEO_TOWER_FILE}: width of {name}", videos.inputs.get(name), width) for name, width in content.items()),
        (f"{RANKER_FILE}: number of tasks", ranker.output, len(declared.tasks)),
        (f"{RANKER_FILE}: width of viewer_dense", ranker.inputs.get("viewer_dense"), declared.viewer_dense),
        (f"{RANKER_FILE}: width of video_dense", ranker.inputs.get("video_dense"), declared.video_dense),
        (f"{RANKER_FILE}: width of viewer_embedding", ranker.inputs.get("viewer_embedding"), declared.embedding),
        (f"{RANKER_FILE}: width of video_embedding", ranker.inputs.get("video_embedding"), declared.embedding),
        (f"{INDEX_FILE}: width of its vectors", in_files.index_width, declared.embedding),
        (f"{INDEX_FILE}: number of vectors", in_files.index_rows, declared.videos),
    ]
    problems += [
        f"{subject} is {actual}, the manifest says {declared_value}"
        for subject, actual, declared_value in expected
        if actual != declared_value
    ]
    if not in_files.index_is_inner_product:
        problems.append(f"{INDEX_FILE} measures another distance than the inner product")
    return problems


def _input_mismatches(name: str, graph: GraphShape, expected: tuple[str, ...]) -> list[str]:
    missing, extra = sorted(set(expected) - set(graph.inputs)), sorted(set(graph.inputs) - set(expected))
    problems = [f"{name} does not take {', '.join(missing)}"] if missing else []
    return [*problems, *([f"{name} has unknown inputs {', '.join(extra)}"] if extra else [])]


def _read_graph(path: Path) -> GraphShape:
    try:
        import onnxruntime
    except ImportError as error:
        raise ReleaseError(f"cannot read {path.name}: onnxruntime is not installed; {_INSTALL}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise IncompatibleReleaseError(
            f"{path} is not a graph that ONNX Runtime can open: {error}; build the release again"
        ) from error
    return GraphShape(
        inputs={input_.name: _width(input_.shape) for input_ in session.get_inputs()},
        output=_width(session.get_outputs()[0].shape),
    )


def _width(shape: list[Any]) -> int | None:
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _read_index(path: Path) -> tuple[int, int, bool]:
    try:
        import faiss
    except ImportError as error:
        raise ReleaseError(f"cannot read {path.name}: faiss is not installed; {_INSTALL}") from error
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise IncompatibleReleaseError(
            f"{path} is not an index that FAISS can open: {error}; build the release again"
        ) from error
    return index.d, index.ntotal, index.metric_type == faiss.METRIC_INNER_PRODUCT
