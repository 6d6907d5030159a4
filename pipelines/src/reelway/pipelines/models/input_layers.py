"""Layers that turn raw feature values into vectors.

They are part of the models, so an exported graph carries their constants. Inputs are numbers (NaN if missing) and
integer codes (0 if missing).
"""

# Shapes: N rows of any kind, W width, H hashes, D embedding

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CLIP = 8.0
"""Limit of a standardised value, in standard deviations, so that one extreme value cannot dominate."""


def signed_log1p(values: Tensor) -> Tensor:
    """Returns ``sign(x) * log(1 + |x|)``: close to the identity for ratios, logarithmic for counts and seconds."""
    return torch.sign(values) * torch.log1p(torch.abs(values))


class Standardiser(nn.Module):
    """Signed logarithm, standardisation by fitted statistics, and a missing indicator per column.

    Shapes: ``[..., W] -> [..., 2 W]``, values (0 if missing), then indicators (1 if missing). The statistics are
    buffers: the state and the exported graph hold them, and the optimiser does not change them.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit(self, values_NW: Tensor) -> None:
        """Fits mean and deviation to the values that are not missing; a constant or empty column keeps scale 1."""
        logs_NW = signed_log1p(values_NW.double())
        present_NW = ~torch.isnan(logs_NW)
        counts_W = present_NW.sum(dim=0).clamp(min=1)
        filled_NW = torch.where(present_NW, logs_NW, torch.zeros_like(logs_NW))
        mean_W = filled_NW.sum(dim=0) / counts_W
        squares_NW = torch.where(present_NW, (logs_NW - mean_W) ** 2, torch.zeros_like(logs_NW))
        deviation_W = (squares_NW.sum(dim=0) / counts_W).sqrt()
        self.mean.copy_(mean_W)
        self.scale.copy_(torch.where(deviation_W > 1e-6, deviation_W, torch.ones_like(deviation_W)))

    def forward(self, values: Tensor) -> Tensor:
        missing = torch.isnan(values)
        known = torch.where(missing, torch.zeros_like(values), values)
        scaled = torch.clamp((signed_log1p(known) - self.mean) / self.scale, -CLIP, CLIP)
        return torch.cat([torch.where(missing, torch.zeros_like(scaled), scaled), missing.to(values.dtype)], dim=-1)


class CategoryEmbeddings(nn.Module):
    """One embedding table per category column, concatenated. Shapes: ``[..., columns] -> [..., columns * width]``."""

    def __init__(self, buckets: Sequence[int], width: int) -> None:
        super().__init__()
        tables = [nn.Embedding(size, width) for size in buckets]
        for table in tables:
            nn.init.normal_(table.weight, std=0.05)
        self.tables = nn.ModuleList(tables)
        self.out_width = width * len(buckets)

    def forward(self, codes: Tensor) -> Tensor:
        return torch.cat([table(codes[..., i]) for i, table in enumerate(self.tables)], dim=-1)


class HashedIdEmbedding(nn.Module):
    """Sum of one embedding per hash code, all from one table. Shapes: ``[..., H] -> [..., D]``.

    An embedding of a code that training never met would be noise. An id with such a code takes the learned vector
    ``unknown`` instead, and the table has rows only for codes that training met (``mark_known``). The optimiser, the
    checkpoints and the exported graph therefore hold no unused rows. In training, dropout of whole ids teaches
    ``unknown`` to stand for any video, and makes the model learn from the content as well.
    """

    row_of: Tensor

    def __init__(self, dim: int, buckets: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.unknown = nn.Parameter(torch.zeros(dim))
        self.dropout = dropout
        self.register_buffer("row_of", torch.zeros(buckets, dtype=torch.int64))  # 0: unknown
        self.table = self._fresh_table(1)

    def _fresh_table(self, rows: int) -> nn.Embedding:
        table = nn.Embedding(rows, self.dim, device=self.unknown.device)
        nn.init.normal_(table.weight, std=self.dim**-0.5)
        return table

    @torch.no_grad()
    def mark_known(self, codes: Tensor) -> None:
        """Declares the codes that training will meet and resets the table. Code 0 (missing) is never among them."""
        met = torch.unique(codes)
        met = met[met > 0]
        self.row_of.zero_()
        self.row_of[met] = torch.arange(1, len(met) + 1, device=met.device)
        self.table = self._fresh_table(len(met) + 1)

    def forward(self, codes: Tensor) -> Tensor:
        rows = self.row_of[codes]
        known = rows.amin(dim=-1, keepdim=True) > 0
        if self.training and self.dropout > 0:
            known = known & (torch.rand(known.shape, device=known.device) >= self.dropout)
        return torch.where(known, self.table(rows).sum(dim=-2), self.unknown)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Adopts the number of rows of a saved table, which depends on the training data."""
        saved = state_dict.get(prefix + "table.weight")
        if saved is not None and len(saved) != self.table.num_embeddings:
            self.table = self._fresh_table(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]
