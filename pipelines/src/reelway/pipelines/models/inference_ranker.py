"""The ranker rearranged for inference and export: one viewer, many candidates.

Training needs many viewers in a batch and plain layers. Serving has one viewer per request, which allows three
shortcuts:

- Coordinates, products and similarity of the embeddings are three linear maps of the video's embedding, with weights
  that depend on the viewer only. They become one map, computed once per request. The viewer's constant part is one more
  row of that map.
- The viewer's affinity to topics and languages is stored beside the embeddings of these words: one row per word instead
  of one per candidate.
- The mixture of experts is one small product per candidate, and the heads are one product per task.

The export fails if the outputs differ from the ranker's.
"""

# Shapes: C candidates, D embedding, W width of the first layer, X experts, E expert width, K tasks, H head width

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelway.pipelines.models.input_layers import CLIP, Standardiser
from reelway.pipelines.models.ranker import (
    AFFINITY,
    CROSS_SCALE,
    VIDEO_LANGUAGE,
    VIDEO_TOPIC,
    VIEWER_LANGUAGE,
    Ranker,
)
from reelway.platform.contracts.feature_names import ID_HASHES

LARGE_LOGIT_CLIP = 1e30
"""``clamp(x * 1e30, -1, 1)`` is the sign of x. ONNX Runtime vectorises these two operations but not its ``Sign``.

Below 1e-30 the logarithm is 0 in any case.
"""


class InferenceRanker(nn.Module):
    """``RANKER_INPUTS`` of one viewer -> ``outputs_CK``, equal to ``Ranker.forward`` without ``viewer_index``."""

    viewer_weight: Tensor
    viewer_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor
    tasks_by_expert: Tensor
    viewer_words: Tensor
    topics: Tensor
    first_word: Tensor
    spoken: Tensor
    creator_rows: Tensor

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker
        trunk = ranker.trunk
        self.experts, self.tasks, self.hidden = trunk.experts, trunk.tasks, trunk.expert_hidden
        order_W = _gates_by_expert(self.experts, self.tasks, self.experts * self.hidden)
        weight_IW = trunk.from_candidate.weight.detach().T[:, order_W]
        width = ranker.embedding_dim
        coordinates = 0 if ranker.config.similarity_only else width
        plain = len(weight_IW) - 2 * coordinates - 1
        parts = _parts(weight_IW.T, [plain, 1, coordinates, coordinates])
        # Weights of the products of both embeddings, and of their sum, the similarity.
        products = CROSS_SCALE * parts[1].T + (width**0.5 * parts[3].T if coordinates else torch.zeros(width, 1))
        self.widths = [self.hidden] * self.experts + ([self.tasks * self.experts] if self.experts > 1 else [])
        # One matrix per expert and one for the gates: splitting a joint matrix at run time would copy it.
        self._register_parts("video_weight", parts[0].T[_reordered_rows(ranker, plain)])
        self._register_parts("products_weight", products)
        self._register_parts("coordinates_weight", parts[2].T if coordinates else torch.zeros_like(products))
        self._register_buffer("viewer_weight", trunk.from_viewer.weight.detach().T[:, order_W])
        self._register_buffer("viewer_bias", trunk.from_viewer.bias.detach()[order_W])
        self._register_buffer("tasks_by_expert", torch.eye(self.tasks).repeat(1, self.experts))
        # The 1 at the end of every topic's row adds the viewer's row of the weights to every candidate.
        self._register_buffer(
            "topics", F.pad(ranker.video_categories.tables[0].get_parameter("weight"), (0, 1), value=1.0)
        )
        # One table for all category columns of the viewer, column after column. The viewer's language selects the
        # columns that are appended to the video's language.
        tables = tuple(table.get_parameter("weight") for table in ranker.viewer_categories.tables)
        self._register_buffer("viewer_words", torch.cat(tables))
        self._register_buffer(
            "first_word", torch.tensor([0, *itertools.accumulate(len(table) for table in tables[:-1])])
        )
        self._register_buffer(
            "spoken", _language_match_table(len(ranker.video_categories.tables[1].get_parameter("weight")))
        )
        # Row 0 belongs to no creator that training met. It holds 1/H of the unknown vector, because H rows are added.
        unknown, creators = ranker.creators.unknown, ranker.creators.table.weight
        self._register_buffer("creator_rows", torch.cat([unknown.unsqueeze(0) / ID_HASHES, creators[1:]]))
        second = ranker.head_second  # a constant head ignores its inputs
        self._register_buffer("last_weight", second.weight * ~ranker.fixed[:, None, None])
        self._register_buffer("last_bias", torch.where(ranker.fixed, ranker.fixed_output, second.bias[:, 0]))

    def _register_buffer(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.detach().clone().contiguous())

    def _register_parts(self, name: str, matrix: Tensor) -> None:
        for x, part in enumerate(_parts(matrix, self.widths)):
            self._register_buffer(f"{name}_{x}", part)

    def forward(
        self,
        viewer_dense: Tensor,
        viewer_categories: Tensor,
        viewer_embedding: Tensor,
        video_dense: Tensor,
        video_categories: Tensor,
        creator_codes: Tensor,
        video_embedding: Tensor,
    ) -> Tensor:
        """Returns ``outputs_CK``. Arguments are those of ``Ranker.forward``; the viewer's have one row."""
        ranker = self.ranker
        word_vectors = F.embedding(viewer_categories + self.first_word, self.viewer_words)
        viewer = [*_standardised(ranker.viewer_dense, viewer_dense), word_vectors.flatten(1)]
        if not ranker.config.similarity_only:
            viewer.append(viewer_embedding)
        first_1W = torch.addmm(self.viewer_bias, torch.cat(viewer, dim=-1), self.viewer_weight)
        spoken = F.embedding(viewer_categories[:, VIEWER_LANGUAGE], self.spoken)
        of_language = torch.cat(
            [ranker.video_categories.tables[1].get_parameter("weight"), spoken.reshape(-1, 2)], dim=-1
        )
        of_topic = torch.cat([_affinities(viewer_dense, self.ranker.dimensions.topics), self.topics], dim=-1)
        given_CI = torch.cat(
            [
                *_standardised(ranker.video_dense, video_dense),
                F.embedding(video_categories[:, VIDEO_LANGUAGE], of_language),
                _vectors(self.creator_rows, ranker.creators.row_of, creator_codes),
                F.embedding(video_categories[:, VIDEO_TOPIC], of_topic),
                video_embedding,
            ],
            dim=-1,
        )
        viewer_D1 = viewer_embedding.reshape(-1, 1)
        mixed_KCE = self._mix_experts(
            [self._first(x, given_CI, row, viewer_D1) for x, row in enumerate(_parts(first_1W, self.widths))]
        )
        heads = self.ranker.head_first
        # Expanded first: adding one row of 24 to all rows takes twice as long as adding two full matrices.
        bias_KCH = heads.bias.unsqueeze(1).expand(-1, given_CI.shape[0], -1)
        heads_KCH = F.relu(mixed_KCE @ heads.weight + bias_KCH)
        return ((heads_KCH @ self.last_weight).squeeze(-1) + self.last_bias.unsqueeze(1)).T

    def _first(self, part: int, given_CI: Tensor, viewer_1W: Tensor, viewer_D1: Tensor) -> Tensor:
        """Returns the first layer's output for one expert, or for the gates.

        One product with all inputs: adding two products, or a bias, would write and read the whole result once more.
        ``addmm`` with ``beta=0`` is a plain product that ONNX Runtime fuses with the following ``relu``.
        """
        video, coordinates, products = (
            self.get_buffer(f"{name}_{part}") for name in ("video_weight", "coordinates_weight", "products_weight")
        )
        weight_IW = torch.cat([video, viewer_1W, coordinates + viewer_D1 * products])
        return torch.addmm(viewer_1W, given_CI, weight_IW, beta=0)

    def _mix_experts(self, first: list[Tensor]) -> Tensor:
        """Returns the mixture of the experts for each task, ``[K, C, E]``; ``[1, C, E]`` for a shared bottom.

        Args:
            first: output of the first layer for each expert and, with more than one expert, for the gates.
        """
        second = self.ranker.trunk.second
        experts = [F.relu(torch.addmm(second.bias[x], F.relu(first[x]), second.weight[x])) for x in range(self.experts)]
        if self.experts == 1:
            return experts[0].unsqueeze(0)
        expert_CXE = torch.cat(experts, dim=-1).reshape(-1, self.experts, second.bias.shape[1])
        # A softmax over an axis of four would be thousands of small softmaxes. The sum over the experts, and the
        # repetition for each expert, are matrix products with ones instead.
        gates, by_expert = first[-1], self.tasks_by_expert
        highest_CK = gates.reshape(-1, self.experts, self.tasks).amax(dim=1)
        raised = torch.exp(gates - highest_CK @ by_expert)
        share_CXK = (raised / (raised @ (by_expert.T @ by_expert))).reshape(-1, self.experts, self.tasks)
        return (share_CXK.transpose(1, 2) @ expert_CXE).transpose(0, 1)


def _gates_by_expert(experts: int, tasks: int, start: int) -> Tensor:
    """Returns the first layer's columns with the gates reordered from task-major to expert-major."""
    before = torch.arange(start)
    if experts == 1:
        return before
    return torch.cat([before, start + torch.arange(tasks * experts).view(tasks, experts).T.reshape(-1)])


def _reordered_rows(ranker: Ranker, plain: int) -> Tensor:
    """Returns the first layer's rows in the order in which ``forward`` concatenates the candidates' columns.

    The ranker's order is numbers, topic, language, creator, two topic crosses, two language crosses. Here the crosses
    of a word follow the word's embedding, and the topic comes last.
    """
    word, creator = ranker.config.category_dim, ranker.config.creator_dim
    widths = [plain - 2 * word - creator - 4, word, word, creator, 2, 2]
    numbers, topic, language, creators, of_topic, of_language = torch.split(torch.arange(plain), widths)
    return torch.cat([numbers, language, of_language, creators, of_topic, topic])


def _parts(matrix: Tensor, widths: list[int]) -> list[Tensor]:
    """Splits the matrix's columns into parts of these widths."""
    ends = list(itertools.accumulate(widths))
    return [matrix[:, end - width : end] for end, width in zip(ends, widths, strict=True)]


def _standardised(numbers: Standardiser, values: Tensor) -> list[Tensor]:
    """Returns the two halves of ``Standardiser.forward``, computed with fewer operations."""
    missing = torch.isnan(values)
    logs = torch.log1p(torch.abs(values)) * torch.clamp(values * LARGE_LOGIT_CLIP, -1.0, 1.0)
    scaled = torch.clamp((logs - numbers.mean) / numbers.scale, -CLIP, CLIP)
    return [torch.where(missing, 0.0, scaled), missing.to(values.dtype)]


def _vectors(rows: Tensor, row_of: Tensor, codes: Tensor) -> Tensor:
    """Returns ``HashedIdEmbedding.forward``: the sum of one row per hash code.

    The rows are added one after another, which is faster than a sum over an axis of two. An id with a code that
    training did not meet takes row 0 for every hash.
    """
    row_vectors = [torch.index_select(row_of, 0, codes[:, h]) for h in range(codes.shape[1])]
    lowest = row_vectors[0]
    for row_vector in row_vectors[1:]:
        lowest = torch.minimum(lowest, row_vector)
    vectors = [F.embedding(torch.where(lowest > 0, row_vector, 0), rows) for row_vector in row_vectors]
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


def _affinities(viewer_dense: Tensor, topics: int) -> Tensor:
    """Returns the topic crosses of ``Ranker`` for each topic, ``[1 + topics, 2]``; row 0 is the unknown topic."""
    affinity_T = viewer_dense[0, AFFINITY : AFFINITY + topics]
    affinity_T = F.pad(torch.where(torch.isnan(affinity_T), 0.0, affinity_T), (1, 0))
    return CROSS_SCALE * torch.stack([affinity_T, F.relu(-affinity_T)], dim=-1)


def _language_match_table(words: int) -> Tensor:
    """Returns, for all pairs of languages, "same" and "other": ``[viewer's language, video's language * 2]``.

    Language 0 is unknown and gives neither. A request reads one row.
    """
    word_L = torch.arange(words)
    known_LL = (word_L > 0) & (word_L > 0).unsqueeze(1)
    same_LL = word_L == word_L.unsqueeze(1)
    return torch.stack([known_LL & same_LL, known_LL & ~same_LL], dim=-1).flatten(1).to(torch.float32)
