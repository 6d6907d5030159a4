"""The ranker as it is exported: the same function of the same inputs, arranged for one viewer and many candidates.

Training wants many viewers in a batch and plain layers. Serving has one viewer a request, and then most of the first
layer's work on the two embeddings is the viewer's alone: coordinates, their products and the similarity are three
linear maps of the video's embedding whose weights the viewer decides, so they are one map, made once a request. The
mixture of experts is linear in the experts up to the heads' first layer, so the heads come before the mixture, and
nothing is transposed for a candidate. Export refuses it where it does not give the ranker's own answers.
"""

# Shapes: C candidates, D embedding, W width of the first layer, X experts, E expert width, K tasks, H head width

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelway.pipelines.models.ranker import (
    AFFINITY,
    VIDEO_LANGUAGE,
    VIDEO_TOPIC,
    VIEWER_LANGUAGE,
    GroupedLinear,
    Ranker,
)
from reelway.platform.contracts.events import TOPICS

_SIMILARITY_SCALE = 4.0


class ServedRanker(nn.Module):
    """``RANKER_INPUTS``, one viewer -> ``outputs_CK``, as ``Ranker.forward`` gives them without ``viewer_index``."""

    plain_weight: Tensor
    similarity_weight: Tensor
    coordinates_weight: Tensor
    products_weight: Tensor
    viewer_weight: Tensor
    viewer_bias: Tensor
    heads_weight: Tensor
    heads_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor

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
        self._keep("plain_weight", parts[0].T)
        self._keep("similarity_weight", _SIMILARITY_SCALE * parts[1].T)
        self._keep("coordinates_weight", parts[2].T)
        self._keep("products_weight", width**0.5 * parts[3].T)
        self._keep("viewer_weight", trunk.from_viewer.weight.detach().T[:, order_W])
        self._keep("viewer_bias", trunk.from_viewer.bias.detach()[order_W])
        self._keep_heads(ranker.head_first, ranker.head_second)

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values.detach().clone().contiguous())

    def _keep_heads(self, first: GroupedLinear, second: GroupedLinear) -> None:
        """All heads side by side; the last layer as one matrix with zeros where one head would see another."""
        tasks, width, hidden = first.weight.shape
        self._keep("heads_weight", first.weight.permute(1, 0, 2).reshape(width, tasks * hidden))
        self._keep("heads_bias", first.bias.reshape(-1))
        last = torch.zeros(tasks, hidden, tasks)
        for k in range(tasks):
            last[k, :, k] = second.weight[k, :, 0].detach()
        self._keep("last_weight", last.reshape(-1, tasks))
        self._keep("last_bias", second.bias[:, 0])

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
        """See the class; every argument as in ``Ranker.forward``, the viewer's with one row."""
        ranker = self.ranker
        viewer = [ranker.viewer_dense(viewer_dense), ranker.viewer_categories(viewer_categories)]
        embedding_D1 = viewer_embedding.T
        by_embedding_DW = embedding_D1 * self.similarity_weight
        if not ranker.config.similarity_only:
            viewer.append(viewer_embedding)
            by_embedding_DW = by_embedding_DW + self.coordinates_weight + embedding_D1 * self.products_weight
        first_1W = torch.addmm(self.viewer_bias, torch.cat(viewer, dim=-1), self.viewer_weight)
        given_CI = torch.cat(
            [
                ranker.video_dense(video_dense),
                ranker.video_categories(video_categories),
                ranker.creators(creator_codes),
                _crosses(viewer_dense, viewer_categories, video_categories),
                video_embedding,
            ],
            dim=-1,
        )
        weight_IW = torch.cat([self.plain_weight, by_embedding_DW], dim=0)
        mixed_CN = self._heads_of_experts(given_CI, weight_IW, first_1W) + self.heads_bias
        outputs_CK = torch.addmm(self.last_bias, F.relu(mixed_CN), self.last_weight)
        return torch.where(ranker.fixed, ranker.fixed_output, outputs_CK)

    def _heads_of_experts(self, given_CI: Tensor, weight_IW: Tensor, first_1W: Tensor) -> Tensor:
        """The heads' first layer over the mixture of experts, without its bias, ``[C, K H]``."""
        widths = [self.hidden] * self.experts + [self.tasks] * (self.experts if self.experts > 1 else 0)
        weights, biases = _parts(weight_IW, widths), _parts(first_1W, widths)
        first = [torch.addmm(bias, given_CI, weight) for bias, weight in zip(biases, weights, strict=True)]
        second = self.ranker.trunk.second
        heads = [
            F.relu(torch.addmm(second.bias[x], F.relu(first[x]), second.weight[x])) @ self.heads_weight
            for x in range(self.experts)
        ]
        if self.experts == 1:
            return heads[0]
        shares, width = _softmax(first[self.experts :]), self.heads_weight.shape[1] // self.tasks
        mixed_CKH: Tensor = heads[0].reshape(-1, self.tasks, width) * shares[0].unsqueeze(-1)
        for head, share in zip(heads[1:], shares[1:], strict=True):
            mixed_CKH = mixed_CKH + head.reshape(-1, self.tasks, width) * share.unsqueeze(-1)
        return mixed_CKH.flatten(1)


def _gates_by_expert(experts: int, tasks: int, start: int) -> Tensor:
    """Columns of the first layer with the gates, which are in the order of the tasks, in the order of the experts."""
    before = torch.arange(start)
    if experts == 1:
        return before
    return torch.cat([before, start + torch.arange(tasks * experts).view(tasks, experts).T.reshape(-1)])


def _parts(matrix: Tensor, widths: list[int]) -> list[Tensor]:
    """The matrix's columns, so many to each part."""
    ends = list(itertools.accumulate(widths))
    return [matrix[:, end - width : end] for end, width in zip(ends, widths, strict=True)]


def _softmax(gates: list[Tensor]) -> list[Tensor]:
    """Over the list: four wide operations, where a softmax over an axis of four is thousands of small ones."""
    highest = gates[0]
    for gate in gates[1:]:
        highest = torch.maximum(highest, gate)
    raised = [torch.exp(gate - highest) for gate in gates]
    total = raised[0]
    for one in raised[1:]:
        total = total + one
    return [one / total for one in raised]


def _crosses(viewer_dense: Tensor, viewer_categories: Tensor, video_categories: Tensor) -> Tensor:
    """What only viewer and video together say, but for the similarity, as ``Ranker`` has it. ``[C, 4]``."""
    affinity_T = viewer_dense[0, AFFINITY : AFFINITY + TOPICS]
    affinity_T = torch.where(torch.isnan(affinity_T), torch.zeros_like(affinity_T), affinity_T)
    affinity_C1 = F.pad(affinity_T, (1, 0))[video_categories[:, VIDEO_TOPIC]].unsqueeze(1)  # row 0: unknown topic
    language_1, language_C = viewer_categories[:, VIEWER_LANGUAGE], video_categories[:, VIDEO_LANGUAGE]
    spoken_C = (language_C > 0) & (language_1 > 0)
    same_C2 = torch.stack([spoken_C & (language_C == language_1), spoken_C & (language_C != language_1)], dim=-1)
    return torch.cat([affinity_C1 * 4.0, F.relu(-affinity_C1) * 4.0, same_C2.to(affinity_C1.dtype)], dim=-1)
