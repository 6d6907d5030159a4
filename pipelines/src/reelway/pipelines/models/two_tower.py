"""Two-tower retrieval: one unit vector per viewer and request, one per video, compared by inner product.

Both towers are exported: the release build embeds the catalogue, the overlay writer embeds later uploads. Losses are in
``losses``.
"""

# Shapes: B viewers, C videos, L history, S = L + 1 slots, H hashes, D embedding, A attention heads, F head width

from __future__ import annotations

from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from reelway.pipelines.models.input_layers import CategoryEmbeddings, HashedIdEmbedding, Standardiser
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import CONTENT_VECTORS, VIDEO_STATIC_DENSE, VIEWER_CATEGORIES

_PRESENT = {name: VIDEO_STATIC_DENSE.index(f"has_{name}") for name in CONTENT_VECTORS}
"""Column of ``video_static_dense`` that states whether a video has the content vector."""


class TwoTowerConfig(BaseModel):
    """Sizes and regularisation. YAML or ``--set two_tower.<field>=...`` sets any field."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dim: Annotated[int, Field(ge=2)] = 48
    """D, of both towers and of the history's tokens."""
    layers: Annotated[int, Field(ge=1)] = 1
    heads: Annotated[int, Field(ge=1)] = 2
    history_length: Annotated[int, Field(ge=1)] = 50
    """Latest videos of the history that the tower reads; a data set with shorter histories gives all it has."""
    feedforward: Annotated[int, Field(ge=1)] = 2
    """Width of a transformer layer's inner part, as a multiple of ``dim``."""
    context_hidden: Annotated[int, Field(ge=1)] = 64
    content_hidden: Annotated[int, Field(ge=1)] = 64
    category_dim: Annotated[int, Field(ge=1)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    id_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of videos whose id is hidden in training, so that their embeddings depend on the content alone."""
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of videos whose visual (audio, text) vector is hidden in training; drawn separately for each modality."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    learn_temperature: bool = True

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self


class CausalTransformerLayer(nn.Module):
    """Pre-norm transformer layer (Xiong et al. 2020) that can compute the last slot alone, at 1/S of the cost."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(feedforward * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def _split(self, x_BSD: Tensor) -> Tensor:
        batch, slots, dim = x_BSD.shape
        return x_BSD.reshape(batch, slots, self.heads, dim // self.heads).transpose(1, 2)  # B A S F

    def forward(self, x_BSD: Tensor, blocked_BSS: Tensor, *, last_only: bool) -> Tensor:
        normed_BSD = self.norm_attention(x_BSD)
        asking_BQD = normed_BSD[:, -1:] if last_only else normed_BSD
        query_BAQF = self._split(self.query(asking_BQD))
        key_BSD, value_BSD = self.key_value(normed_BSD).chunk(2, dim=-1)
        scores_BAQS = query_BAQF @ self._split(key_BSD).transpose(-2, -1) * query_BAQF.shape[-1] ** -0.5
        blocked_BQS = blocked_BSS[:, -1:] if last_only else blocked_BSS
        weights_BAQS = torch.softmax(scores_BAQS.masked_fill(blocked_BQS.unsqueeze(1), -1e9), dim=-1)
        mixed_BQD = (self.dropout(weights_BAQS) @ self._split(value_BSD)).transpose(1, 2).flatten(2)
        x_BQD: Tensor = (x_BSD[:, -1:] if last_only else x_BSD) + self.dropout(self.out(mixed_BQD))
        inner_BQD: Tensor = self.dropout(self.feedforward(self.norm_feedforward(x_BQD)))
        return x_BQD + inner_BQD


class HistoryEncoder(nn.Module):
    """Causal transformer over the watch history, oldest first, with a request slot at the end.

    A token is the sum of the video's id vector, the outcome weight and age of the impression, and its rank from the
    end. The request slot starts from the context and the latest token, so an empty history leaves the context alone.
    """

    def __init__(self, config: TwoTowerConfig, dimensions: FeatureDimensions, ids: HashedIdEmbedding) -> None:
        super().__init__()
        self.ids = ids
        self.length = min(config.history_length, dimensions.history_length)
        self.outcome = nn.Sequential(nn.Linear(7, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim))
        self.recency = nn.Parameter(torch.randn(self.length, config.dim) * 0.02)  # last row is the latest
        self.latest = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            CausalTransformerLayer(config.dim, config.heads, config.feedforward, config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, codes_BLH: Tensor, weights_BL: Tensor, age_BL: Tensor, context_BD: Tensor) -> Tensor:
        codes_BLH = codes_BLH[:, -self.length :]
        weights_BL, age_BL = weights_BL[:, -self.length :], age_BL[:, -self.length :]
        padded_BL = codes_BLH[..., 0] == 0
        length = codes_BLH.shape[1]
        token_BLD = self.ids(codes_BLH) + self._interaction_features(weights_BL, age_BL) + self.recency[-length:]
        token_BLD = self.dropout(token_BLD) * (~padded_BL).unsqueeze(-1)
        x_BSD = torch.cat([token_BLD, (context_BD + self.latest(token_BLD[:, -1])).unsqueeze(1)], dim=1)
        blocked_BSS = self._blocked(padded_BL)
        for i, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, blocked_BSS, last_only=i == len(self.layers) - 1)
        history_BD: Tensor = self.norm(x_BSD[:, -1])
        return history_BD

    def _interaction_features(self, weights_BL: Tensor, age_BL: Tensor) -> Tensor:
        age_BL = torch.log1p(age_BL)
        parts = [
            weights_BL,
            (weights_BL > 0).to(weights_BL.dtype),
            (weights_BL < 0).to(weights_BL.dtype),
            age_BL * 0.2,
            # bumps around minutes, a day, two weeks
            *(torch.exp(-((age_BL - centre) ** 2) / 4.0) for centre in (0.0, 3.0, 6.0)),
        ]
        manner_BLD: Tensor = self.outcome(torch.stack(parts, dim=-1))
        return manner_BLD

    @staticmethod
    def _blocked(padded_BL: Tensor) -> Tensor:
        """Returns the attention mask: true for later slots and padding, never for the slot itself (no empty row)."""
        slots = padded_BL.shape[1] + 1
        index = torch.arange(slots, device=padded_BL.device)
        future_SS = index.unsqueeze(0) > index.unsqueeze(1)
        itself_SS = index.unsqueeze(0) == index.unsqueeze(1)
        padded_BS = F.pad(padded_BL, (0, 1), value=False)
        return (future_SS | padded_BS.unsqueeze(1)) & ~itself_SS


class ViewerTower(nn.Module):
    """``VIEWER_TOWER_INPUTS`` -> unit vector ``viewer_embedding_BD``."""

    def __init__(self, config: TwoTowerConfig, dimensions: FeatureDimensions, ids: HashedIdEmbedding) -> None:
        super().__init__()
        self.dense = Standardiser(len(dimensions.viewer_dense))
        self.categories = CategoryEmbeddings(
            [dimensions.category_buckets] * len(VIEWER_CATEGORIES), config.category_dim
        )
        width = 2 * self.dense.width + self.categories.out_width
        self.context = nn.Sequential(
            nn.Linear(width, config.context_hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.context_hidden, config.dim),
        )
        self.history = HistoryEncoder(config, dimensions, ids)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(
        self,
        viewer_dense: Tensor,
        viewer_categories: Tensor,
        history_codes: Tensor,
        history_weights: Tensor,
        history_age_h: Tensor,
    ) -> Tensor:
        context_BD = self.context(torch.cat([self.dense(viewer_dense), self.categories(viewer_categories)], dim=-1))
        history_BD = self.history(history_codes, history_weights, history_age_h, context_BD)
        return F.normalize(self.out(history_BD) + context_BD, dim=-1, eps=1e-6)


class ModalityEncoder(nn.Module):
    """Projects one content vector; a learned vector replaces it if it is missing or, in training, dropped out."""

    def __init__(self, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.missing = nn.Parameter(torch.randn(dim) * 0.02)
        self.dropout = dropout

    def forward(self, content_CW: Tensor, present_C1: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            present_C1 = present_C1 & (torch.rand(present_C1.shape, device=present_C1.device) >= self.dropout)
        return torch.where(present_C1, self.project(content_CW), self.missing)


class VideoTower(nn.Module):
    """``VIDEO_TOWER_INPUTS`` -> unit vector ``video_embedding_CD``."""

    def __init__(self, config: TwoTowerConfig, dimensions: FeatureDimensions, ids: HashedIdEmbedding) -> None:
        super().__init__()
        self.ids = ids
        creator_dim = config.dim // 2
        self.creators = HashedIdEmbedding(creator_dim, dimensions.id_buckets, dropout=config.id_dropout)
        self.categories = CategoryEmbeddings([dimensions.topics + 1, dimensions.category_buckets], config.category_dim)
        self.static = Standardiser(len(VIDEO_STATIC_DENSE))
        modality_dim = config.dim // 2
        self.modalities = nn.ModuleDict(
            {
                name: ModalityEncoder(width, modality_dim, config.modality_dropout)
                for name, width in dimensions.content.items()
                if width
            }
        )
        width = (
            creator_dim + self.categories.out_width + 2 * len(VIDEO_STATIC_DENSE) + len(self.modalities) * modality_dim
        )
        self.content = nn.Sequential(
            nn.Linear(width, config.content_hidden), nn.GELU(), nn.Linear(config.content_hidden, config.dim)
        )

    def forward(
        self,
        video_codes: Tensor,
        creator_codes: Tensor,
        video_categories: Tensor,
        video_static_dense: Tensor,
        visual: Tensor | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        content = {"visual": visual, "audio": audio, "text": text}
        parts = [
            self.creators(creator_codes),
            self.categories(video_categories),
            self.static(video_static_dense),
            *(
                modality(content[name], video_static_dense[:, _PRESENT[name]].unsqueeze(1) > 0.5)
                for name, modality in self.modalities.items()
            ),
        ]
        content_CD = self.content(torch.cat(parts, dim=-1))
        return F.normalize(self.ids(video_codes) + content_CD, dim=-1, eps=1e-6)


class TwoTower(nn.Module):
    """Both towers, which share one table of video ids, and the temperature of their inner product."""

    def __init__(self, config: TwoTowerConfig, dimensions: FeatureDimensions) -> None:
        super().__init__()
        self.config = config
        self.dimensions = dimensions
        ids = HashedIdEmbedding(config.dim, dimensions.id_buckets, dropout=config.id_dropout)
        self.viewer_tower = ViewerTower(config, dimensions, ids)
        self.video_tower = VideoTower(config, dimensions, ids)
        self.log_temperature = nn.Parameter(
            torch.tensor(config.temperature).log(), requires_grad=config.learn_temperature
        )

    @property
    def ids(self) -> HashedIdEmbedding:
        """The id table that both towers share."""
        return self.video_tower.ids

    def temperature(self) -> Tensor:
        """The softmax temperature, at least 0.01; below, the softmax would be numerically one-hot."""
        return self.log_temperature.exp().clamp(0.01, 1.0)
