"""The index: exact for small catalogues, compressed and tuned to a recall for large ones."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from reelway.pipelines import search_index
from reelway.platform.errors import ConfigError

F32 = NDArray[np.float32]


def unit(rows: int, width: int, seed: int = 0) -> F32:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def catalogue() -> F32:
    """A catalogue large enough for compression; its vectors form clusters, as embeddings do."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, 16)).astype(np.float32)
    vectors = centres[rng.integers(0, 200, 20_000)] + 0.5 * rng.standard_normal((20_000, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def large(catalogue: F32) -> faiss.Index:
    return search_index.make_index(catalogue)


def test_index_is_compressed_from_20_000_videos_on() -> None:
    assert search_index.index_factory(19_999, 64) == "Flat"
    assert search_index.index_factory(20_000, 64) == "IVF512,PQ64x4fsr"
    assert search_index.index_factory(1_000_000, 64) == "IVF4000,PQ64x4fsr"
    assert search_index.index_factory(50_000, 64, "HNSW32") == "HNSW32"


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
def test_reproducible_index_finds_each_video_by_its_vector(tmp_path: Path, factory: str) -> None:
    vectors = unit(2_000, 8)
    for name in ("a.faiss", "b.faiss"):
        search_index.write_index(tmp_path / name, search_index.make_index(vectors, factory))
    assert (tmp_path / "a.faiss").read_bytes() == (tmp_path / "b.faiss").read_bytes()
    index = faiss.read_index(str(tmp_path / "a.faiss"))
    similarity, rows = index.search(vectors, 1)
    np.testing.assert_array_equal(rows[:, 0], np.arange(2_000))
    np.testing.assert_allclose(similarity[:, 0], 1.0, rtol=1e-5)


@pytest.mark.parametrize("factory", ["Cube", "IVF500,Flat"])
def test_impossible_index_is_a_configuration_error(factory: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot build index '{factory}' of 100 videos"):
        search_index.make_index(unit(100, 8), factory)


def test_large_index_file_holds_the_tuned_probes(catalogue: F32, large: faiss.Index, tmp_path: Path) -> None:
    viewers = unit(24, 16, seed=3)
    recall = search_index.tune_probes(large, catalogue, viewers, wanted=200)
    assert recall is not None
    assert recall >= search_index.TARGET_RECALL
    probes = faiss.extract_index_ivf(large).nprobe
    assert probes < faiss.extract_index_ivf(large).nlist  # fewer than all lists
    search_index.write_index(tmp_path / "index.faiss", large)
    assert (tmp_path / "index.faiss").stat().st_size / len(
        catalogue
    ) < 24  # 8 bytes of codes, 8 bytes of id, and the lists
    mapped = faiss.read_index(str(tmp_path / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
    assert faiss.extract_index_ivf(mapped).nprobe == probes
    rows = search_index.search(mapped, catalogue, viewers[0], 200)
    np.testing.assert_array_equal(rows, search_index.search(large, catalogue, viewers[0], 200))
    scores = catalogue[rows] @ viewers[0]
    assert (np.diff(scores) <= 0).all()


def test_lower_recall_needs_fewer_lists(catalogue: F32, large: faiss.Index) -> None:
    viewers = unit(24, 16, seed=3)
    search_index.tune_probes(large, catalogue, viewers, wanted=200, recall=0.9)
    few = faiss.extract_index_ivf(large).nprobe
    search_index.tune_probes(large, catalogue, viewers, wanted=200, recall=0.99)
    assert few < faiss.extract_index_ivf(large).nprobe


def test_exact_index_has_no_probes() -> None:
    vectors = unit(50, 8)
    assert search_index.tune_probes(search_index.make_index(vectors), vectors, vectors[:2], 10) is None
