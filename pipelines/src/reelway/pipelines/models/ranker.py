"""Multi-task ranker: scores every candidate on all of ``RANKER_TASKS`` in one pass.

Outputs are logits, and log1p(seconds) for ``watch_s``. Calibration follows elsewhere; a sigmoid here would be applied
twice. The viewer's part of the first layer is computed once per viewer and added to the candidates' part. This holds in
training (many rows per viewer) and in serving (one viewer, many candidates).
"""

# Shapes: V viewers, C candidates (rows), D embedding, T topics, X experts, E expert width, K tasks, H head width

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

from reelway.pipelines.models.input_layers import CategoryEmbeddings, HashedIdEmbedding, Standardiser
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import (
    RANKER_TASKS,
    VIDEO_CATEGORIES,
    VIDEO_DENSE,
    VIEWER_ACTIVITY,
    VIEWER_CATEGORIES,
)

POSITIONS = 64
"""Positions at or beyond this share one bias; position -1 (not shown) has none."""

CROSS_SCALE = 4.0
"""Factor of the affinity and the similarity, which brings them to the scale of the standardised inputs."""
AFFINITY = len(VIEWER_ACTIVITY)
"""First column of the topic affinities in ``viewer_dense``."""
VIEWER_LANGUAGE = VIEWER_CATEGORIES.index("language")
VIDEO_TOPIC = VIDEO_CATEGORIES.index("topic")
VIDEO_LANGUAGE = VIDEO_CATEGORIES.index("video_language")


def _check_task(name: str) -> str:
    if name not in RANKER_TASKS:
        raise ValueError(f"expected one of {', '.join(RANKER_TASKS)}")
    return name


TaskName = Annotated[str, AfterValidator(_check_task)]


class RankerConfig(BaseModel):
    """Sizes and regularisation. YAML or ``--set ranker.<field>=...`` sets any field."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["shared_bottom", "mmoe"] = "mmoe"
    """One trunk for all heads, or experts that a gate mixes for each head (MMoE, Ma et al. 2018)."""
    experts: Annotated[int, Field(ge=1)] = 4
    """Number of experts under ``mmoe``."""
    expert_hidden: Annotated[int, Field(ge=1)] = 64
    expert_out: Annotated[int, Field(ge=1)] = 48
    head_hidden: Annotated[int, Field(ge=1)] = 24
    category_dim: Annotated[int, Field(ge=1)] = 8
    creator_dim: Annotated[int, Field(ge=1)] = 16
    similarity_only: bool = False
    """Use the inner product of the two embeddings alone, not their coordinates.

    The ranker then overfits less and stays valid when the two-tower is trained again.
    """
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    creator_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    position_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training rows whose position is hidden, so that the model learns the case "no position" of serving."""
    uncertainty: bool = False
    """Learn the task weights (Kendall et al. 2018) instead of using ``task_weights``."""
    task_weights: dict[TaskName, float] = {"watch_s": 0.5}
    """Weight of a head's loss; 1 for a head that is not named."""


class GroupedLinear(nn.Module):
    """G linear layers as one batched product. Shapes: ``[C, G, in] -> [C, G, out]``."""

    def __init__(self, groups: int, width_in: int, width_out: int) -> None:
        super().__init__()
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(groups, width_in, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(groups, width_out))

    def forward(self, x_CGI: Tensor) -> Tensor:
        return (x_CGI.transpose(0, 1) @ self.weight).transpose(0, 1) + self.bias


class MixtureOfExperts(nn.Module):
    """Experts mixed by one gate per task (MMoE, Ma et al. 2018). Output: ``[C, K, E]``.

    A shared bottom is one expert without gates.
    """

    def __init__(self, config: RankerConfig, viewer_width: int, candidate_width: int) -> None:
        super().__init__()
        self.experts = config.experts if config.kind == "mmoe" else 1
        self.tasks = len(RANKER_TASKS)
        self.expert_hidden = config.expert_hidden
        gates = self.tasks * self.experts if self.experts > 1 else 0
        width = self.experts * config.expert_hidden + gates
        self.from_viewer = nn.Linear(viewer_width, width)
        self.from_candidate = nn.Linear(candidate_width, width, bias=False)
        self.second = GroupedLinear(self.experts, config.expert_hidden, config.expert_out)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, viewer_VW: Tensor, candidate_CW: Tensor, viewer_index_C: Tensor | None) -> Tensor:
        first_VW = self.from_viewer(viewer_VW)
        if viewer_index_C is not None:
            first_VW = first_VW.index_select(0, viewer_index_C)
        first_CW = first_VW + self.from_candidate(candidate_CW)
        hidden_CW = first_CW[:, : self.experts * self.expert_hidden]
        hidden_CXE = self.dropout(F.relu(hidden_CW)).unflatten(-1, (self.experts, self.expert_hidden))
        expert_CXE = F.relu(self.second(hidden_CXE))
        if self.experts == 1:
            return expert_CXE.expand(-1, self.tasks, -1)
        gate_CKX = first_CW[:, self.experts * self.expert_hidden :].unflatten(-1, (self.tasks, self.experts))
        return torch.softmax(gate_CKX, dim=-1) @ expert_CXE


class PositionBias(nn.Module):
    """Shallow tower that absorbs the effect of the position (Zhao et al. 2019). Shapes: ``[C] -> [C, K]``.

    Position -1 means "not shown" and adds nothing. Serving leaves the tower out, which is equivalent.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.bias = nn.Embedding(POSITIONS + 1, len(RANKER_TASKS))
        self.dropout = dropout
        nn.init.zeros_(self.bias.weight)

    def forward(self, position_C: Tensor) -> Tensor:
        slot_C = position_C.clamp(-1, POSITIONS - 1) + 1
        shown_C = slot_C > 0
        if self.training and self.dropout > 0:
            shown_C = shown_C & (torch.rand(shown_C.shape, device=shown_C.device) >= self.dropout)
        bias_CK: Tensor = self.bias(slot_C) * shown_C.unsqueeze(-1)
        return bias_CK


class Ranker(nn.Module):
    """``RANKER_INPUTS`` -> ``outputs_CK`` in the order of ``RANKER_TASKS``."""

    fixed: Tensor
    fixed_output: Tensor

    def __init__(self, config: RankerConfig, embedding_dim: int, dimensions: FeatureDimensions) -> None:
        super().__init__()
        self.config = config
        self.embedding_dim = embedding_dim
        self.dimensions = dimensions
        viewer_dense, categories = len(dimensions.viewer_dense), dimensions.category_buckets
        self.viewer_dense = Standardiser(viewer_dense)
        self.viewer_categories = CategoryEmbeddings([categories] * len(VIEWER_CATEGORIES), config.category_dim)
        self.video_dense = Standardiser(len(VIDEO_DENSE))
        self.video_categories = CategoryEmbeddings([dimensions.topics + 1, categories], config.category_dim)
        self.creators = HashedIdEmbedding(config.creator_dim, dimensions.id_buckets, dropout=config.creator_dropout)
        coordinates = 0 if config.similarity_only else embedding_dim
        viewer_width = 2 * viewer_dense + self.viewer_categories.out_width + coordinates
        crosses = 5 + coordinates
        candidate_width = (
            2 * len(VIDEO_DENSE) + self.video_categories.out_width + config.creator_dim + coordinates + crosses
        )
        self.trunk = MixtureOfExperts(config, viewer_width, candidate_width)
        self.head_first = GroupedLinear(len(RANKER_TASKS), config.expert_out, config.head_hidden)
        self.head_second = GroupedLinear(len(RANKER_TASKS), config.head_hidden, 1)
        self.position_bias = PositionBias(config.position_dropout)
        self.register_buffer("fixed", torch.zeros(len(RANKER_TASKS), dtype=torch.bool))
        self.register_buffer("fixed_output", torch.zeros(len(RANKER_TASKS)))

    @torch.no_grad()
    def initialise_output_bias(self, base_output_K: Tensor) -> None:
        """Sets each head's output bias to its base rate (logit) or mean, which saves training steps."""
        self.head_second.bias.copy_(base_output_K.unsqueeze(-1))

    @torch.no_grad()
    def set_constant_head(self, task: str, logit: float) -> None:
        """Makes a head output ``logit`` always, for labels that have one class only."""
        k = RANKER_TASKS.index(task)
        self.fixed[k] = True
        self.fixed_output[k] = logit

    def forward(
        self,
        viewer_dense: Tensor,
        viewer_categories: Tensor,
        viewer_embedding: Tensor,
        video_dense: Tensor,
        video_categories: Tensor,
        creator_codes: Tensor,
        video_embedding: Tensor,
        viewer_index: Tensor | None = None,
    ) -> Tensor:
        """Returns logits ``[C, K]``.

        Args:
            viewer_dense: ``[V, ...]``, as all viewer inputs; V is 1 without ``viewer_index``.
            video_dense: ``[C, ...]``, as all video inputs.
            viewer_index: the viewer of each candidate, ``[C]``; by default all candidates belong to viewer 0.
        """
        crosses_CW, products_CD = self._cross_features(
            viewer_dense, viewer_categories, viewer_embedding, video_categories, video_embedding, viewer_index
        )
        viewer = [self.viewer_dense(viewer_dense), self.viewer_categories(viewer_categories)]
        candidate = [
            self.video_dense(video_dense),
            self.video_categories(video_categories),
            self.creators(creator_codes),
            crosses_CW,
        ]
        if not self.config.similarity_only:
            viewer.append(viewer_embedding)
            candidate += [video_embedding, products_CD]
        viewer_VW, candidate_CW = torch.cat(viewer, dim=-1), torch.cat(candidate, dim=-1)
        mixed_CKE = self.trunk(viewer_VW, candidate_CW, viewer_index)
        outputs_CK = self.head_second(F.relu(self.head_first(mixed_CKE))).squeeze(-1)
        return torch.where(self.fixed, self.fixed_output, outputs_CK)

    def _cross_features(
        self,
        viewer_dense: Tensor,
        viewer_categories: Tensor,
        viewer_embedding: Tensor,
        video_categories: Tensor,
        video_embedding: Tensor,
        viewer_index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the features of viewer and video together: ``[C, 5]``, and the products of the embeddings ``[C, D]``.

        The five columns are topic affinity, its negative part, same language, other language, and similarity.
        """
        affinity_VT = viewer_dense[:, AFFINITY : AFFINITY + self.dimensions.topics]
        unknown_VT = torch.isnan(affinity_VT)
        affinity_VT = torch.where(unknown_VT, torch.zeros_like(affinity_VT), affinity_VT)
        affinity_VT = F.pad(affinity_VT, (1, 0))  # column 0: unknown topic
        language_V = viewer_categories[:, VIEWER_LANGUAGE]
        if viewer_index is not None:
            affinity_VT, language_V = affinity_VT[viewer_index], language_V[viewer_index]
            viewer_embedding = viewer_embedding[viewer_index]
        topic_C1 = video_categories[:, VIDEO_TOPIC : VIDEO_TOPIC + 1]
        affinity_C1 = affinity_VT.expand(topic_C1.shape[0], -1).gather(1, topic_C1)
        language_C = video_categories[:, VIDEO_LANGUAGE]
        spoken_C = (language_C > 0) & (language_V > 0)
        same_C2 = torch.stack([spoken_C & (language_C == language_V), spoken_C & (language_C != language_V)], dim=-1)
        product_CD = viewer_embedding * video_embedding
        dot_C1 = product_CD.sum(dim=-1, keepdim=True)
        # the embeddings are unit vectors: times sqrt(D), each product has the magnitude of the inner product
        scale = video_embedding.shape[-1] ** 0.5
        crosses = [
            affinity_C1 * CROSS_SCALE, F.relu(-affinity_C1) * CROSS_SCALE, same_C2.to(product_CD.dtype),
            dot_C1 * CROSS_SCALE,
        ]  # fmt: skip
        return torch.cat(crosses, dim=-1), product_CD * scale
