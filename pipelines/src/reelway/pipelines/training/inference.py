"""Runs the trained models on numpy arrays in chunks, to embed a catalogue and to evaluate."""

# Shapes: B viewers, C videos, D embedding, K tasks

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reelway.pipelines.models.ranker import Ranker
from reelway.pipelines.models.two_tower import TwoTower
from reelway.pipelines.training.batches import as_tensor
from reelway.platform.contracts.feature_names import (
    RANKER_INPUTS,
    RANKER_TASKS,
    VIDEO_TOWER_INPUTS,
    VIEWER_TOWER_INPUTS,
)
from reelway.platform.features.assembly import VideoArrays, ViewerArrays

F32 = NDArray[np.float32]
_CHUNK = 2048


def embed_videos(model: TwoTower, videos: VideoArrays, *, chunk: int = _CHUNK) -> F32:
    """Returns unit vectors, ``[C, D]``."""
    return _chunked(
        model.video_tower, {name: getattr(videos, name) for name in VIDEO_TOWER_INPUTS}, chunk, model.config.dim
    )


def embed_viewers(model: TwoTower, viewers: ViewerArrays, *, chunk: int = _CHUNK) -> F32:
    """Returns unit vectors, ``[B, D]``."""
    return _chunked(
        model.viewer_tower, {name: getattr(viewers, name) for name in VIEWER_TOWER_INPUTS}, chunk, model.config.dim
    )


def ranker_inputs(
    viewers: ViewerArrays, viewer_embedding: F32, videos: VideoArrays, video_embedding: F32
) -> dict[str, NDArray[Any]]:
    """Returns arrays by the names and in the order of ``RANKER_INPUTS``."""
    inputs = {
        **dataclasses.asdict(videos),
        "viewer_dense": viewers.viewer_dense,
        "viewer_categories": viewers.viewer_categories,
        "viewer_embedding": viewer_embedding,
        "video_embedding": video_embedding,
    }
    return {name: inputs[name] for name in RANKER_INPUTS}


def score(model: Ranker, inputs: Mapping[str, NDArray[Any]], viewer_index: NDArray[np.int64] | None = None) -> F32:
    """Returns ranker outputs ``[C, K]``: logits and log1p(seconds), without the position tower, as in serving.

    Args:
        inputs: by the names of ``RANKER_INPUTS`` (see ``ranker_inputs``).
        viewer_index: row of each candidate's viewer in the viewer inputs, ``[C]``; by default row 0 for all.
    """
    rows = len(inputs["video_dense"])
    out = np.empty((rows, len(RANKER_TASKS)), dtype=np.float32)
    viewer = [as_tensor(inputs[name]) for name in RANKER_INPUTS[:3]]
    with _eval_mode(model):
        for start in range(0, rows, 8 * _CHUNK):
            part = slice(start, start + 8 * _CHUNK)
            videos = [as_tensor(inputs[name][part]) for name in RANKER_INPUTS[3:]]
            index = None if viewer_index is None else as_tensor(viewer_index[part])
            out[part] = model(*viewer, *videos, viewer_index=index).numpy()
    return out


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the previous mode."""
    before = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(before)


def _chunked(tower: nn.Module, inputs: Mapping[str, NDArray[Any]], chunk: int, dim: int) -> F32:
    rows = len(next(iter(inputs.values())))
    out = np.empty((rows, dim), dtype=np.float32)
    with _eval_mode(tower):
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            out[part] = tower(*(as_tensor(values[part]) for values in inputs.values())).numpy()
    return out
