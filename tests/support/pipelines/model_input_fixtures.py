"""Random model inputs with the names and shapes of the contract."""

from __future__ import annotations

import torch
from tests.support.dimensions import DIMENSIONS
from torch import Tensor

from reelway.platform.contracts import feature_names as names


def viewer_inputs(rows: int, *, length: int = DIMENSIONS.history_length, seed: int = 0) -> dict[str, Tensor]:
    """Viewer inputs with full histories and some missing numbers."""
    random = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, len(DIMENSIONS.viewer_dense), generator=random) * 20 - 2
    dense[torch.rand(dense.shape, generator=random) < 0.1] = float("nan")
    return {
        "viewer_dense": dense,
        "viewer_categories": torch.randint(0, DIMENSIONS.category_buckets, (rows, 4), generator=random),
        "history_codes": torch.randint(1, DIMENSIONS.id_buckets, (rows, length, names.ID_HASHES), generator=random),
        "history_weights": torch.rand(rows, length, generator=random) * 3 - 1,
        "history_age_h": torch.rand(rows, length, generator=random) * 100,
    }


def video_inputs(rows: int, *, seed: int = 1) -> dict[str, Tensor]:
    """Video inputs with all modalities and some missing numbers."""
    random = torch.Generator().manual_seed(seed)
    static = torch.rand(rows, len(names.VIDEO_STATIC_DENSE), generator=random) * 60
    static[:, 1:] = 1.0
    dense = torch.rand(rows, len(names.VIDEO_DENSE), generator=random) * 20
    dense[torch.rand(dense.shape, generator=random) < 0.2] = float("nan")
    dense[:, : static.shape[1]] = static
    categories = torch.stack(
        [
            torch.randint(0, DIMENSIONS.topics + 1, (rows,), generator=random),
            torch.randint(0, DIMENSIONS.category_buckets, (rows,), generator=random),
        ],
        dim=1,
    )
    return {
        "video_codes": torch.randint(1, DIMENSIONS.id_buckets, (rows, names.ID_HASHES), generator=random),
        "creator_codes": torch.randint(1, DIMENSIONS.id_buckets, (rows, names.ID_HASHES), generator=random),
        "video_categories": categories,
        "video_static_dense": static,
        "visual": torch.randn(rows, DIMENSIONS.visual, generator=random),
        "audio": torch.randn(rows, DIMENSIONS.audio, generator=random),
        "text": torch.randn(rows, DIMENSIONS.text, generator=random),
        "video_dense": dense,
    }
