"""REAM (arXiv 2604.04356): merge the most similar experts into the most salient ones after neuron alignment.

saliency      s_i  = mean over X_i of g_i |e_i|                                      (REAP's)
similarity    S_ij = ( (1 + cos(v_i, v_j)) / 2  +  1 - d_ij / max d ) / 2
              v_i = mean over all tokens of softmax(z)_i e_i,   d_ij = | z_i/|z_i| - z_j/|z_j| | over all tokens
groups        the N most salient experts, the best first, each take the most similar free ones until they are full
alignment     cost_ab = |h_a - h_b| + |w_a - w_b| of unit vectors: activations over the same tokens, and weights
merge         saliency-weighted average; the router keeps the row of the most salient member
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.layer.cost import Cost, LayerShape
from ...core.layer.observation import ObservedLayer
from ...core.merging.alignment import match_neurons, unit_distances, weight_cosines
from ...core.merging.all_experts import (
    activation_cosines,
    activation_cosines_cost,
    logit_cosines,
    mean_outputs,
    mean_outputs_cost,
    router_logits,
    sample_cost,
    sample_tokens,
)
from ...core.merging.averaging import average_groups, average_groups_cost
from ...core.merging.grouping import absorb_nearest
from ..registry import Candidate, LayerProblem, merged_candidates, register_method


if TYPE_CHECKING:
    from ...config import DernConfig


FULL_GROUPS = 8  # a full group holds one in so many experts: 16 of 128 in the paper


@register_method("ream")
class Ream:
    """The REAM method: router-weighted expert activation merging."""

    needs_router_logits = True
    defaults = {"selection": "reap", "calibration_order": "sequential"}
    options = ()

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        layer = problem.layer
        num_experts, count = len(layer.segments.up), len(problem.retained)
        hidden = sample_tokens(layer)
        saliency = above_zero(problem.scores)
        capacity = max(math.ceil(num_experts / FULL_GROUPS), math.ceil(num_experts / count))
        similarity = output_and_router_similarity(layer, hidden)
        grouping = absorb_nearest(problem.retained, similarity, saliency, capacity, layer.num_groups)

        def align(representative: int, member: int) -> Tensor:
            activations = unit_distances(activation_cosines(layer, hidden, representative, member))
            return match_neurons(activations + unit_distances(weight_cosines(layer.segments, representative, member)))

        merged = average_groups(layer.segments, grouping, saliency, align)
        return merged_candidates(problem, grouping, merged)

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        return 2, 1  # groups form around the retained experts

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        sample, means, averaged = sample_cost(shape), mean_outputs_cost(shape), average_groups_cost(shape)
        compared = activation_cosines_cost(shape)
        aligned = (shape.experts - shape.retained) * compared.operations
        return [
            means._replace(held=sample.held + means.held),
            Cost(sample.held + compared.held + averaged.held, averaged.experts, aligned),
        ]


def above_zero(scores: Tensor) -> Tensor:
    """Replace scores of 0 (no token) by the least positive score, at most 0.5, so that all weights are positive."""
    positive = scores[scores > 0]
    least = min(0.5, positive.min().item()) if len(positive) else 1.0
    return torch.where(scores > 0, scores, least)


def output_and_router_similarity(layer: ObservedLayer, hidden: Tensor) -> Tensor:
    """Compute REAM's similarity S (E, E) of experts from their mean outputs and router logits, in float64."""
    logits = router_logits(layer, hidden)
    outputs = normalize(mean_outputs(layer, hidden, logits.softmax(dim=1)), dim=1)
    distances = unit_distances(logit_cosines(layer, logits))
    return ((1 + outputs @ outputs.T) / 2 + 1 - distances / distances.max().clamp(min=1e-300)) / 2
