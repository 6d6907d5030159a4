"""Raw feature values to trainable vectors, inside the model, so that an exported graph carries every constant.

Refuses to know where values come from: it sees numbers (NaN where missing) and codes (0 where missing) only.
"""

# Shapes: N rows of any kind, W width, H hashes, D embedding

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CLIP = 8.0
"""Standard deviations: one absurd value must not drown the others."""


def signed_log1p(values: Tensor) -> Tensor:
    """``sign(x) * log(1 + |x|)``: near the identity for ratios, logarithmic for counts and seconds."""
    return torch.sign(values) * torch.log1p(torch.abs(values))


class Standardiser(nn.Module):
    """Signed logarithm, standardisation by fitted statistics, and a missing indicator per column.

    ``[..., W] -> [..., 2 W]``: values (0 where missing), then indicators (1 where missing). The statistics are
    buffers: part of the state and of the exported graph, untouched by the optimiser.
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
        """Take mean and deviation over the values that are there; a constant or absent column keeps scale 1."""
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


class Categories(nn.Module):
    """One small embedding per category column, concatenated: ``[..., columns] -> [..., columns * width]``."""

    def __init__(self, buckets: Sequence[int], width: int) -> None:
        super().__init__()
        tables = [nn.Embedding(size, width) for size in buckets]
        for table in tables:
            nn.init.normal_(table.weight, std=0.05)
        self.tables = nn.ModuleList(tables)
        self.out_width = width * len(buckets)

    def forward(self, codes: Tensor) -> Tensor:
        return torch.cat([table(codes[..., i]) for i, table in enumerate(self.tables)], dim=-1)


class HashedIds(nn.Module):
    """Sum of one embedding per hash code, all from one table: ``[..., H] -> [..., D]``.

    A code that training never met would carry noise, so ids with such a code take the one learned "unknown" vector
    instead, and the table has rows for the codes that were met only (``mark_known``): the optimiser, the checkpoints
    and the exported graph carry no dead weight. Random whole-id dropout in training gives the unknown vector the
    meaning "some video I know nothing about", and forces the content beside it to carry the rest.
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
        """Declare, before training, which codes it will meet; the table starts anew. Code 0 (missing) never is one."""
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
        """A saved table may have another number of rows than this one: how many depends on what was trained on."""
        saved = state_dict.get(prefix + "table.weight")
        if saved is not None and len(saved) != self.table.num_embeddings:
            self.table = self._fresh_table(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]
