"""Codes of ids and category values are stable across processes and evenly distributed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from reelway.platform.contracts.feature_names import ID_HASHES
from reelway.platform.features.hashing import category_code, category_codes, id_codes, mix64

BUCKETS, WORDS = 32_768, 64


def test_only_missing_values_have_code_zero() -> None:
    assert id_codes(np.array([-1, -9]), BUCKETS).tolist() == [[0] * ID_HASHES] * 2
    codes = id_codes(np.arange(100_000), BUCKETS)
    assert codes.min() >= 1
    assert codes.max() < BUCKETS
    assert category_code(None, WORDS) == category_code("", WORDS) == 0
    assert all(0 < category_code(f"word {i}", WORDS) < WORDS for i in range(1000))


def test_codes_are_equal_in_another_process() -> None:
    script = (
        "import numpy as np; from reelway.platform.features.hashing import id_codes, category_code;"
        "print(id_codes(np.array([7, 2**53 - 1]), 32768).tolist(), category_code('eu', 64))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert other == f"{id_codes(np.array([7, 2**53 - 1]), BUCKETS).tolist()} {category_code('eu', WORDS)}"


def test_two_ids_rarely_share_both_codes() -> None:
    pairs = id_codes(np.arange(50_000), BUCKETS)
    assert len(np.unique(pairs, axis=0)) > 49_990


def test_id_codes_keep_the_shape_of_non_contiguous_input() -> None:
    ids = np.arange(24).reshape(4, 6)
    assert id_codes(ids, BUCKETS).shape == (4, 6, ID_HASHES)
    assert np.array_equal(id_codes(ids[:, ::2], BUCKETS), id_codes(ids, BUCKETS)[:, ::2])


def test_mixing_is_one_to_one() -> None:
    values = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(mix64(values))) == len(values)


def test_category_codes_equal_single_codes() -> None:
    assert category_codes(["eu", None, "us"], WORDS).tolist() == [
        category_code("eu", WORDS),
        0,
        category_code("us", WORDS),
    ]
