"""Injects faults into the ranker's ONNX graph, for releases that drills roll out.

The graph loads, keeps its inputs and outputs, and answers requests of unknown viewers, so it passes the warm-up. Only
some requests hit the fault, as with real model bugs. Nothing outside the graph is changed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from reelway.platform.contracts.feature_names import VIEWER_ACTIVITY
from reelway.platform.errors import ReleaseError

RECENT_IMPRESSIONS_FEATURE: Final = "impressions_30d"
"""The viewer feature that triggers the fault; missing (NaN) for unknown viewers."""
_ORIGINAL_OUTPUT: Final = "before_the_fault"
_MATRIX_SIZE: Final = 192
"""Width of the square matrix that the slow graph multiplies with itself."""
_PROBE_ROUNDS: Final = 64


def fail_known_viewers(path: Path) -> None:
    """Makes the graph fail for every viewer with a history, by a lookup of a row that does not exist.

    Raises:
        ReleaseError: if the graph does not have exactly one output.
    """
    model = _load_graph(path)
    table = numpy_helper.from_array(np.zeros(1, dtype=np.float32), "fault_table")
    model.graph.initializer.append(table)
    row = _is_above(model, 0.0)
    model.graph.node.append(helper.make_node("Cast", [row], ["fault_row"], to=TensorProto.INT64))
    model.graph.node.append(helper.make_node("Gather", ["fault_table", "fault_row"], ["fault_value"], axis=0))
    _add_to_output(model, "fault_value", path)


def slow_down_busy_viewers(path: Path, *, above: float, slow_ms: float) -> None:
    """Adds about ``slow_ms`` of useless work for viewers with more than ``above`` recent impressions.

    The amount of work is calibrated on this machine with one thread.

    Raises:
        ReleaseError: if the graph does not have exactly one output.
    """
    model = _load_graph(path)
    rounds = max(1, round(slow_ms / _ms_per_round()))
    condition = _is_above(model, above)
    works, rests = _busy_work_graph("fault_shape_of", rounds), _no_op_graph()
    model.graph.node.append(helper.make_node("Squeeze", [condition], ["fault_condition"]))
    model.graph.node.append(
        helper.make_node("If", ["fault_condition"], ["fault_value"], then_branch=works, else_branch=rests)
    )
    _add_to_output(model, "fault_value", path)


def _load_graph(path: Path) -> onnx.ModelProto:
    model = onnx.load(str(path))
    if len(model.graph.output) != 1:
        raise ReleaseError(f"{path}: {len(model.graph.output)} outputs, expected one; pass a ranker graph")
    return model


def _is_above(model: onnx.ModelProto, limit: float) -> str:
    """Adds nodes for "the viewer's feature is above the limit" and returns the boolean ``[1]``; false for NaN."""
    column = numpy_helper.from_array(
        np.array([VIEWER_ACTIVITY.index(RECENT_IMPRESSIONS_FEATURE)], dtype=np.int64), "fault_feature"
    )
    bound = numpy_helper.from_array(np.array([limit], dtype=np.float32), "fault_limit")
    model.graph.initializer.extend([column, bound])
    model.graph.node.extend(
        [
            helper.make_node("Gather", ["viewer_dense", "fault_feature"], ["fault_seen_11"], axis=1),
            helper.make_node("Squeeze", ["fault_seen_11", "fault_rows"], ["fault_shape_of"]),
            helper.make_node("Greater", ["fault_shape_of", "fault_limit"], ["fault_above"]),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], dtype=np.int64), "fault_rows"))
    return "fault_above"


def _add_to_output(model: onnx.ModelProto, value: str, path: Path) -> None:
    """Adds ``value`` to the output. It is 0 whenever its computation succeeds."""
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [_ORIGINAL_OUTPUT if output == name else output for output in node.output]
        node.input[:] = [_ORIGINAL_OUTPUT if input_name == name else input_name for input_name in node.input]
    model.graph.node.append(helper.make_node("Add", [_ORIGINAL_OUTPUT, value], [name]))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _busy_work_graph(seed: str, rounds: int) -> onnx.GraphProto:
    """Returns a graph that computes ``rounds`` matrix products from the outer float ``[1]`` ``seed`` and gives zero."""
    square = helper.make_tensor_value_info("matrix", TensorProto.FLOAT, [_MATRIX_SIZE, _MATRIX_SIZE])
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["matrix", "matrix"], ["product"]),
            helper.make_node("Tanh", ["product"], ["matrix_after"]),
            helper.make_node("Identity", ["go_on"], ["go_on_after"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            square,
        ],
        [
            helper.make_tensor_value_info("go_on_after", TensorProto.BOOL, []),
            helper.make_tensor_value_info("matrix_after", TensorProto.FLOAT, [_MATRIX_SIZE, _MATRIX_SIZE]),
        ],
    )
    return helper.make_graph(
        [
            helper.make_node("Expand", [seed, "shape"], ["start"]),
            helper.make_node("Loop", ["rounds", "always", "start"], ["end"], body=body),
            helper.make_node("ReduceMax", ["end"], ["largest"], keepdims=0),
            helper.make_node("Mul", ["largest", "nothing"], ["worked"]),
        ],
        "works",
        [],
        [helper.make_tensor_value_info("worked", TensorProto.FLOAT, [1])],
        initializer=[
            numpy_helper.from_array(np.array([_MATRIX_SIZE, _MATRIX_SIZE], dtype=np.int64), "shape"),
            numpy_helper.from_array(np.array(rounds, dtype=np.int64), "rounds"),
            numpy_helper.from_array(np.array(True), "always"),
            numpy_helper.from_array(np.zeros(1, dtype=np.float32), "nothing"),
        ],
    )


def _no_op_graph() -> onnx.GraphProto:
    zero = numpy_helper.from_array(np.zeros(1, dtype=np.float32), "zero")
    rest = helper.make_node("Constant", [], ["rested"], value=zero)
    return helper.make_graph([rest], "rests", [], [helper.make_tensor_value_info("rested", TensorProto.FLOAT, [1])])


def _ms_per_round() -> float:
    """Measures the milliseconds of one round: the minimum of several attempts, to exclude other load on the machine."""
    graph = _busy_work_graph("seed", _PROBE_ROUNDS)
    graph.input.append(helper.make_tensor_value_info("seed", TensorProto.FLOAT, [1]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seed = {"seed": np.array([3.0], dtype=np.float32)}
    session.run(None, seed)
    tries = []
    for _ in range(5):
        started = time.thread_time()  # the session computes in this thread; other processes' turns do not count
        session.run(None, seed)
        tries.append(1000 * (time.thread_time() - started) / _PROBE_ROUNDS)
    return min(tries)
