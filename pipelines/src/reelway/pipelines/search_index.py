"""The FAISS index of a release: its type, its training, and the number of lists that a search probes.

From ``FLAT_BELOW`` videos on, the index is compressed to 4 bits per vector value: 44 bytes per video instead of 264,
and a search reads less memory. Its results are scored again with the exact vectors of the video table.

The number of probed lists is measured, not configured. It is the smallest number that reaches ``TARGET_RECALL``
relative to an exact search for real viewers. It is stored in the index.
"""

# Shapes: N videos, D embedding, Q viewers

from __future__ import annotations

from pathlib import Path
from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.release_files import INDEX_OVERFETCH
from reelway.platform.errors import ConfigError

F32 = NDArray[np.float32]

AUTO_INDEX: Final = "auto"
FLAT_BELOW: Final = 20_000
TARGET_RECALL: Final = 0.99
"""Share of the exact search's results that the index must find, over all viewers of the measurement."""
_ITERATIONS: Final = 10
_POINTS_PER_LIST: Final = 64  # recall is the same as with FAISS's 256, in a quarter of the time
_LEAST_POINTS_PER_LIST: Final = 39  # FAISS warns below this number
_INITIAL_PROBES: Final = 8
"""Probed lists before ``tune_probes``."""
_STEP: Final = 1.2


def index_factory(rows: int, width: int, factory: str = AUTO_INDEX) -> str:
    """Returns the FAISS factory string.

    ``auto`` is exact below ``FLAT_BELOW`` videos, and has about 4 sqrt(N) lists of 4-bit residuals above.
    """
    if factory != AUTO_INDEX:
        return factory
    lists = min(round(4 * rows**0.5), rows // _LEAST_POINTS_PER_LIST)
    return "Flat" if rows < FLAT_BELOW else f"IVF{lists},PQ{width}x4fsr"


def make_index(embedding_ND: F32, factory: str = AUTO_INDEX) -> faiss.Index:
    """Returns a trained inner-product index whose ids are the rows of ``embedding_ND``. Deterministic.

    Raises:
        ConfigError: if the factory string is invalid, or its index needs more videos.
    """
    rows, width = embedding_ND.shape
    name = index_factory(rows, width, factory)
    vectors = np.ascontiguousarray(embedding_ND, dtype=np.float32)
    try:
        index = faiss.index_factory(width, name, faiss.METRIC_INNER_PRODUCT)
        if inverted := faiss.try_extract_index_ivf(index):
            inverted.cp.niter = _ITERATIONS
            inverted.cp.max_points_per_centroid = _POINTS_PER_LIST
            inverted.nprobe = min(_INITIAL_PROBES, inverted.nlist)
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"FAISS cannot build index {name!r} of {rows} videos with {width} values: {reason}; pass another --index"
        ) from error
    return index


def tune_probes(
    index: faiss.Index, embedding_ND: F32, viewers_QD: F32, wanted: int, recall: float = TARGET_RECALL
) -> float | None:
    """Sets the number of probed lists to the smallest one that reaches ``recall``. Returns the reached recall.

    Returns ``None`` for an index without lists.

    Args:
        viewers_QD: viewer embeddings of the viewer tower.
        wanted: number of videos that a request needs from the index.
    """
    inverted = faiss.try_extract_index_ivf(index)
    if not inverted:
        return None
    exact = exact_neighbours(embedding_ND, viewers_QD, wanted)
    probes = 1
    while True:
        inverted.nprobe = min(probes, inverted.nlist)
        reached = recall_of(index, embedding_ND, viewers_QD, exact)
        if reached >= recall or inverted.nprobe == inverted.nlist:
            return reached
        probes = max(probes + 1, int(probes * _STEP))


def recall_of(index: faiss.Index, embedding_ND: F32, viewers_QD: F32, exact: list[NDArray[np.int64]]) -> float:
    """Returns the share of the ``exact`` rows (one array per viewer) that serving would find."""
    hits = total = 0
    for viewer_D, rows in zip(viewers_QD, exact, strict=True):
        hits += len(np.intersect1d(search(index, embedding_ND, viewer_D, len(rows)), rows))
        total += len(rows)
    return hits / max(total, 1)


def search(index: faiss.Index, embedding_ND: F32, viewer_D: F32, wanted: int) -> NDArray[np.int64]:
    """Returns the rows of the nearest videos, best first, as serving does: overfetched and scored again."""
    _, rows = index.search(viewer_D[None], min(INDEX_OVERFETCH * wanted, len(embedding_ND)))
    candidates = rows[0][rows[0] >= 0]
    best = np.argsort(-(embedding_ND[candidates] @ viewer_D), kind="stable")[:wanted]
    return np.asarray(candidates[best])


def exact_neighbours(embedding_ND: F32, viewers_QD: F32, wanted: int) -> list[NDArray[np.int64]]:
    """Returns the rows that an exact search finds for each viewer, in any order."""
    wanted = min(wanted, len(embedding_ND))
    return [np.argpartition(-(embedding_ND @ viewer_D), wanted - 1)[:wanted] for viewer_D in viewers_QD]


def write_index(path: Path, index: faiss.Index) -> None:
    """Writes ``index.faiss``, from bytes in memory so that a full disk raises an ``OSError`` and no FAISS error."""
    path.write_bytes(faiss.serialize_index(index).tobytes())
