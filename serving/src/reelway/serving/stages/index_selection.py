"""Search parameters that make a FAISS index leave rows out of a search."""

from __future__ import annotations

from typing import Any, Final

import faiss
import numpy as np

from reelway.serving.stages.arrays import U8

_FAISS: Final[Any] = faiss
"""The module without its type stubs, which lack the arguments of these constructors."""


def select_rows(index: faiss.Index, searchable: U8) -> Any:
    """Returns search parameters for the rows whose bit is set.

    Parameters replace the index's own settings, so they repeat these.
    """
    return _selecting(index, _FAISS.IDSelectorBitmap(searchable))


def accepts_selector(index: faiss.Index) -> bool:
    """Whether the index can leave rows out of a search. An index that cannot raises when it is searched."""
    everything = np.full(-(-index.ntotal // 8), 0xFF, dtype=np.uint8)
    try:
        index.search(np.zeros((1, index.d), dtype=np.float32), 1, params=select_rows(index, everything))
    except RuntimeError:
        return False
    return True


def _selecting(index: faiss.Index, selector: Any) -> Any:
    index = _FAISS.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _FAISS.SearchParametersPreTransform(index_params=_selecting(index.index, selector))
    if isinstance(index, faiss.IndexIVF):
        return _FAISS.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return _FAISS.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return _FAISS.SearchParameters(sel=selector)
