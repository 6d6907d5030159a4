"""Similar videos by content, similar creators, and each creator's best videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.pipelines import content_tables
from reelway.platform.contracts.release_files import CREATORS_SCHEMA, NEIGHBOURS_PER_VIDEO, VIDEOS_PER_CREATOR
from reelway.platform.release.tables import open_table


def clustered(clusters: int, each: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((clusters, width)) * 3
    return (centre.repeat(each, axis=0) + rng.standard_normal((clusters * each, width)) + 20.0).astype(np.float32)


def test_content_vectors_weigh_modalities_equally() -> None:
    visual, audio = clustered(4, 10, 8, seed=0), 1000 * clustered(4, 10, 4, seed=1)
    audio[::3] = 0.0  # missing
    visual[1], audio[1] = 0.0, 0.0
    content = content_tables.content_vectors([visual, audio])
    length = np.linalg.norm(content, axis=1)
    np.testing.assert_allclose(np.delete(length, 1), 1.0, atol=1e-6)
    assert length[1] == 0.0
    both = np.flatnonzero(np.abs(audio).max(axis=1) > 0)
    np.testing.assert_allclose(np.linalg.norm(content[both, :8], axis=1), np.sqrt(0.5), atol=1e-6)
    assert (content[3, 8:] == 0).all()


def test_content_neighbours_are_of_the_same_cluster() -> None:
    vectors = content_tables.content_vectors([clustered(6, 15, 16, seed=2), clustered(6, 15, 7, seed=3)])
    rows = content_tables.content_neighbours(vectors)
    assert rows.shape == (90, NEIGHBOURS_PER_VIDEO)
    of_cluster = rows[:, :14] // 15 == np.arange(90)[:, None] // 15
    assert of_cluster.mean() > 0.99
    assert (rows != np.arange(90)[:, None]).all()


def test_video_without_content_has_no_neighbours() -> None:
    vectors = content_tables.content_vectors([clustered(2, 4, 4, seed=4)])
    vectors[3] = 0.0
    rows = content_tables.content_neighbours(vectors)
    assert (rows[3] == -1).all()
    assert 3 not in rows.ravel().tolist()
    assert (content_tables.content_neighbours(np.zeros((3, 4), np.float32)) == -1).all()


@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
@settings(max_examples=60)
def test_best_videos_are_the_most_watched_then_the_newest(videos: list[tuple[int, int, int]]) -> None:
    creator, count, uploaded = (np.array(column) for column in zip(*videos, strict=True))
    creators = np.unique(creator[creator >= 0])
    rows = content_tables.best_videos(creator, count.astype(float), uploaded.astype(float), creators)
    for code, one in enumerate(creators.tolist()):
        own = sorted(np.flatnonzero(creator == one).tolist(), key=lambda row: (-count[row], -uploaded[row], row))
        assert [row for row in rows[code].tolist() if row >= 0] == own[:VIDEOS_PER_CREATOR]


def test_similar_creators_have_near_mean_embeddings(tmp_path: Path) -> None:
    embedding = np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0, 1], [0.1, 0.9], [1, 1]], np.float32)
    creator = np.array([20, 20, 30, 40, 50, -1])
    creators = np.array([20, 30, 40, 50])
    rows = content_tables.similar_creators(embedding, creator, creators)
    assert rows[:, 0].tolist() == [1, 0, 3, 2]
    assert -1 in rows[0].tolist()
    best = content_tables.best_videos(creator, np.zeros(6), np.arange(6.0), creators)
    content_tables.write_creators(tmp_path / "creators.arrow", creators, rows, best)
    assert open_table(tmp_path / "creators.arrow", CREATORS_SCHEMA).num_rows == 4
