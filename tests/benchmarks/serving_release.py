"""A release of realistic size for the serving benchmark: the product's model classes, exported as in a build.

The weights are random, because latency does not depend on them. Everything else is as in a trained release.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tests.benchmarks.catalogue import make_catalogue
from tests.support.dimensions import DIMENSIONS
from tests.support.release_files import NOW_S, describe_files, make_release_folder, write_arrow, write_manifest

from reelway.pipelines import search_index
from reelway.pipelines.models.ranker import Ranker, RankerConfig
from reelway.pipelines.models.two_tower import TwoTower, TwoTowerConfig
from reelway.pipelines.training.export import export_ranker, export_viewer_tower
from reelway.platform.contracts.api import RequestContext
from reelway.platform.contracts.blend import Blend
from reelway.platform.contracts.manifest import INDEX_FILE, RANKER_FILE, VIDEOS_FILE, VIEWER_TOWER_FILE, Manifest
from reelway.serving.video_table import VideoTable, open_record_batch, open_video_table
from reelway.serving.viewer_query import viewer_query

EMBEDDING = 64
TRIED = 64
"""Number of viewers that the index is tuned with."""
TOWER = TwoTowerConfig(dim=EMBEDDING, layers=2)
RANKER = RankerConfig(kind="mmoe", expert_hidden=128, expert_out=64)


def make_realistic_release(folder: Path, videos: int, *, seed: int = 0) -> Manifest:
    """Writes a complete release with D = 64, a two-layer viewer tower and an MMoE ranker of four experts."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    manifest = make_release_folder(folder, videos=videos, embedding=EMBEDDING, seed=seed)
    _search_like_a_build(folder, videos, seed)
    table = open_video_table(folder / "videos.arrow")
    viewer = viewer_query(viewer_row(table, np.random.default_rng(seed)), RequestContext(), NOW_S, table, seed=0)
    tower = TwoTower(TOWER, DIMENSIONS)
    export_viewer_tower(tower, folder / VIEWER_TOWER_FILE, viewer.arrays)
    ranker = Ranker(RANKER, EMBEDDING, DIMENSIONS)
    rows = np.arange(500, dtype=np.int32) % len(table)
    sample = {
        "viewer_dense": viewer.arrays.viewer_dense,
        "viewer_categories": viewer.arrays.viewer_categories,
        "viewer_embedding": table.embedding[:1],
        **table.gather(rows, NOW_S).as_inputs(),
    }
    export_ranker(ranker, folder / RANKER_FILE, sample)
    manifest = manifest.model_copy(update={"files": describe_files(folder)})
    write_manifest(folder, manifest)
    return manifest


def _search_like_a_build(folder: Path, videos: int, seed: int) -> None:
    """Replaces the embeddings by realistic ones, and writes an index that is built and tuned as in a build."""
    catalogue = make_catalogue(videos, TRIED, EMBEDDING, seed)
    batch = open_record_batch(folder / VIDEOS_FILE)
    column = pa.FixedSizeListArray.from_arrays(pa.array(catalogue.videos.reshape(-1)), EMBEDDING)
    at = batch.schema.get_field_index("embedding")
    table = pa.Table.from_batches([batch]).set_column(at, batch.schema.field(at), column)
    temporary = folder / "videos.temporary"
    write_arrow(temporary, table)
    temporary.replace(folder / VIDEOS_FILE)
    index = search_index.make_index(catalogue.videos)
    search_index.tune_probes(index, catalogue.videos, catalogue.viewers, Blend().retrieval.candidates)
    search_index.write_index(folder / INDEX_FILE, index)


def viewer_row(table: VideoTable, rng: np.random.Generator) -> dict[str, object]:
    """Returns a viewer with a full history of 50 videos."""
    watched = rng.choice(table.video_id, size=50, replace=False)
    return {
        "region": "eu",
        "language": "en",
        "segment": "18-24",
        "created_at_s": NOW_S - 90 * 86_400,
        "history_videos": watched.tolist(),
        "history_weights": rng.choice([-0.5, 1.0, 2.0], size=50).tolist(),
        "history_times_s": (NOW_S - 3600.0 * np.arange(50, 0, -1)).tolist(),
        "topic_affinity": rng.dirichlet(np.ones(32)).tolist(),
    }
