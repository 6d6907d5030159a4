"""Writes the follows of the data set into the viewers' memory, from which the source of followed creators reads them.

Later follows are written by the routers. A follow is never undone, because the data set has no such outcome.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.training_rows import LABELS_FILE
from reelway.platform.features.viewer_memory import ViewerMemory


def restore_follows(memory: ViewerMemory, features_dir: Path, at_s: float) -> int:
    """Adds every creator of a video that a viewer followed from by ``at_s``. Idempotent. Returns the number of follows.

    A run without labels has no follows.

    Raises:
        StorageError: if the memory cannot be written.
    """
    path = features_dir / LABELS_FILE
    if not path.exists():
        return 0
    labels = pq.read_table(path, columns=["viewer_id", "creator_id", "outcome_time"], filters=pc.field("follow") > 0)
    known = times_us(labels["outcome_time"]) <= at_s * 1e6
    pairs_N2 = np.stack([labels["viewer_id"].to_numpy(), labels["creator_id"].to_numpy()], axis=1)[known]
    pairs_N2 = np.unique(pairs_N2[(pairs_N2 >= 0).all(axis=1)], axis=0)  # without anonymous viewers
    bounds = np.flatnonzero(np.diff(pairs_N2[:, 0], prepend=-1, append=-1))
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        memory.follow(int(pairs_N2[first, 0]), pairs_N2[first:end, 1].tolist())
    return len(pairs_N2)
