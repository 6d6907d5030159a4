"""The index of a release: which kind, how it is trained, and how many of its lists a search must look into.

From ``FLAT_BELOW`` videos on it keeps 4 bits of each value of a vector, and what it proposes is scored again with the
whole vectors of the video table: 44 bytes a video instead of 264, and less to read in a search. How many lists are
looked into is not a constant that somebody chose: it is the least number that finds what an exact search finds,
measured on real viewers, and it is written into the index.
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
"""Of the exact answer, over all of the viewers that it is tried with."""
_ITERATIONS: Final = 10
_POINTS_PER_LIST: Final = 64  # recall is the same as with FAISS's 256, in a quarter of the time
_LEAST_POINTS_PER_LIST: Final = 39  # FAISS warns of fewer
_INITIAL_PROBES: Final = 8
"""Until they are tuned: for what searches with every video of the catalogue."""
_STEP: Final = 1.2


def index_factory(rows: int, width: int, factory: str = AUTO_INDEX) -> str:
    """FAISS's name of the index: exact below ``FLAT_BELOW`` videos, else about 4 sqrt(N) lists of 4-bit residuals."""
    if factory != AUTO_INDEX:
        return factory
    lists = min(round(4 * rows**0.5), rows // _LEAST_POINTS_PER_LIST)
    return "Flat" if rows < FLAT_BELOW else f"IVF{lists},PQ{width}x4fsr"


def make_index(embedding_ND: F32, factory: str = AUTO_INDEX) -> faiss.Index:
    """A trained inner-product index whose ids are the rows of ``embedding_ND``; the same input, the same index.

    Raises:
        ConfigError: FAISS does not know the factory string, or it needs more videos.
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
        raise ConfigError(f"FAISS cannot make index {name!r} of {rows} videos with {width} values: {reason}") from error
    return index


def tune_probes(
    index: faiss.Index, embedding_ND: F32, viewers_QD: F32, wanted: int, recall: float = TARGET_RECALL
) -> float | None:
    """Let the index look into as few lists as find ``recall`` of the ``wanted`` best videos; the recall it then has.

    ``None`` for an index without lists, which has nothing to choose.

    Args:
        viewers_QD: viewers' embeddings, as the viewer tower gives them.
        wanted: so many videos are asked for in a request.
    """
    inverted = faiss.try_extract_index_ivf(index)
    if not inverted:
        return None
    exact = exact_neighbours(embedding_ND, viewers_QD, wanted)
    probes = 1
    while True:
        inverted.nprobe = min(probes, inverted.nlist)
        found = recall_of(index, embedding_ND, viewers_QD, exact)
        if found >= recall or inverted.nprobe == inverted.nlist:
            return found
        probes = max(probes + 1, int(probes * _STEP))


def recall_of(index: faiss.Index, embedding_ND: F32, viewers_QD: F32, exact: list[NDArray[np.int64]]) -> float:
    """Share of the ``exact`` rows, one array a viewer, that serving would find."""
    hits = total = 0
    for viewer_D, rows in zip(viewers_QD, exact, strict=True):
        hits += len(np.intersect1d(search(index, embedding_ND, viewer_D, len(rows)), rows))
        total += len(rows)
    return hits / max(total, 1)


def search(index: faiss.Index, embedding_ND: F32, viewer_D: F32, wanted: int) -> NDArray[np.int64]:
    """Rows of the nearest videos, best first, as serving finds them: overfetched and scored again."""
    _, rows = index.search(viewer_D[None], min(INDEX_OVERFETCH * wanted, len(embedding_ND)))
    found = rows[0][rows[0] >= 0]
    best = np.argsort(-(embedding_ND[found] @ viewer_D), kind="stable")[:wanted]
    return np.asarray(found[best])


def exact_neighbours(embedding_ND: F32, viewers_QD: F32, wanted: int) -> list[NDArray[np.int64]]:
    """What an exact search finds, in any order."""
    wanted = min(wanted, len(embedding_ND))
    return [np.argpartition(-(embedding_ND @ viewer_D), wanted - 1)[:wanted] for viewer_D in viewers_QD]


def write_index(path: Path, index: faiss.Index) -> None:
    """``index.faiss``; through bytes, so that a full disk is an ``OSError`` and not FAISS's own."""
    path.write_bytes(faiss.serialize_index(index).tobytes())
