"""The tables of a release for the sources by content and by creator: similar videos, similar creators, best videos.

Content is compared by the vectors of the data set and not by the video tower, which has also learned who watches what.
A video that resembles nothing that its viewers watched is therefore found by content only.
"""

# Shapes: N videos, V content values, D embedding, K neighbours, C creators, W values of one modality

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.release_tables import F32, F64, I64, write_arrow
from reelway.pipelines.search_index import make_index
from reelway.platform.contracts.release_files import (
    CREATORS_SCHEMA,
    NEIGHBOURS_PER_VIDEO,
    SIMILAR_CREATORS,
    VIDEOS_PER_CREATOR,
)

Rows = NDArray[np.int32]


def content_vectors(modalities: Sequence[F32]) -> F32:
    """Returns one vector of unit length per video from its visual, audio and text vectors, ``[N, V]``.

    Each modality is centred over the videos that have it, because the vectors of one encoder share a large common part
    (Mu and Viswanath 2018), and then scaled to unit length, so that no modality outweighs another by its scale. A
    missing modality (a row of zeros) contributes nothing. A video without content has a row of zeros.
    """
    parts = []
    for vectors_NW in modalities:
        present = np.abs(vectors_NW).max(axis=1, initial=0.0) > 0
        centred = np.zeros(vectors_NW.shape, dtype=np.float64)
        if present.any():
            centred[present] = vectors_NW[present] - vectors_NW[present].mean(axis=0, dtype=np.float64)
        parts.append(_unit(centred))
    return _unit(np.concatenate(parts, axis=1)).astype(np.float32)


def content_neighbours(content_NV: F32) -> Rows:
    """Returns the rows of the videos with the most similar content, ``[N, K]``, best first, padded with -1.

    Only videos with a positive similarity are neighbours.
    """
    return _nearest(content_NV, NEIGHBOURS_PER_VIDEO)


def similar_creators(embedding_ND: F32, creator_N: I64, creators_C: I64) -> Rows:
    """Returns positions in ``creators_C`` of the creators with the nearest mean embedding, ``[C, K]``, padded with -1.

    Args:
        creators_C: the creators to compare, ascending.
    """
    of_creator = np.flatnonzero(creator_N >= 0)
    code = np.searchsorted(creators_C, creator_N[of_creator])
    mean_CD = np.zeros((len(creators_C), embedding_ND.shape[1]))
    np.add.at(mean_CD, code, embedding_ND[of_creator])
    return _nearest(_unit(mean_CD).astype(np.float32), SIMILAR_CREATORS)


def best_videos(creator_N: I64, watches_N: F64, uploaded_at_s: F64, creators_C: I64) -> Rows:
    """Returns the rows of each creator's videos with the most long watches, newest first if equal, padded with -1.

    Shapes: ``[N], [N], [N], [C] -> [C, VIDEOS_PER_CREATOR]``.
    """
    order = np.lexsort((-np.nan_to_num(uploaded_at_s, nan=-np.inf), -watches_N, creator_N))
    order = order[creator_N[order] >= 0]
    code = np.searchsorted(creators_C, creator_N[order])
    rank = np.arange(len(code)) - np.searchsorted(code, code, side="left")
    selected = rank < VIDEOS_PER_CREATOR
    rows_CK = np.full((len(creators_C), VIDEOS_PER_CREATOR), -1, dtype=np.int32)
    rows_CK[code[selected], rank[selected]] = order[selected]
    return rows_CK


def write_creators(path: Path, creator_id: I64, similar_CK: Rows, best_CK: Rows) -> None:
    """Writes ``creators.arrow``, ascending in ``creator_id``."""
    columns = [pa.array(creator_id, pa.int64()), _lists(similar_CK), _lists(best_CK)]
    write_arrow(path, columns, CREATORS_SCHEMA)


def _nearest(unit_NV: F32, count: int) -> Rows:
    """Returns the ``count`` rows with the largest positive inner product with each row, itself excluded."""
    rows = len(unit_NV)
    result = np.full((rows, count), -1, dtype=np.int32)
    if not rows or not unit_NV.any():
        return result
    # Pairs of values, as the compressed index of large catalogues requires.
    padded = np.pad(unit_NV, ((0, 0), (0, unit_NV.shape[1] % 2)))
    similarity, near = make_index(padded).search(np.ascontiguousarray(padded), min(count + 1, rows))
    valid = (near >= 0) & (near != np.arange(rows)[:, None]) & (similarity > 0)
    order = np.argsort(~valid, axis=1, kind="stable")[:, :count]
    nearest = np.where(np.take_along_axis(valid, order, axis=1), np.take_along_axis(near, order, axis=1), -1)
    result[:, : nearest.shape[1]] = nearest
    return result


def _unit(vectors: NDArray[Any]) -> NDArray[Any]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-9))


def _lists(matrix: Rows) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1), pa.int32()), matrix.shape[1])
