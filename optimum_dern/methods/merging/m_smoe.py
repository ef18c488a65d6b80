"""M-SMoE (arXiv 2310.01334): align and average experts with similar router logits.

frequency     f_i  = share of the tokens that reach expert i
similarity    S_ij = cos(z_i, z_j), router logits over all tokens
groups        the N most frequent experts are dominant; every other joins the most similar dominant one
alignment     the permutation P of neurons that maximises <G_a, P G_b> + <U_a, P U_b> + <D_a, P D_b>
merge         frequency-weighted average; the router keeps the row of the dominant expert
"""

from typing import TYPE_CHECKING

from torch import Tensor

from ...core.layer.cost import Cost, LayerShape
from ...core.merging.alignment import match_neurons, weight_products
from ...core.merging.all_experts import logit_cosines, router_logits, sample_cost, sample_tokens, sampled_tokens
from ...core.merging.averaging import average_groups, average_groups_cost
from ...core.merging.grouping import join_nearest
from ..registry import Candidate, LayerProblem, merged_candidates, register_method


if TYPE_CHECKING:
    from ...config import DernConfig


@register_method("m_smoe")
class MSmoe:
    """The M-SMoE method: expert merging guided by router logits."""

    needs_router_logits = True
    defaults = {"selection": "frequency"}
    options = ()

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        layer = problem.layer
        similarity = logit_cosines(layer, router_logits(layer, sample_tokens(layer)))
        grouping = join_nearest(problem.retained, similarity, layer.num_groups)

        def align(dominant: int, member: int) -> Tensor:
            return match_neurons(-weight_products(layer.segments, dominant, member))

        frequency = layer.statistics.count
        merged = average_groups(layer.segments, grouping, frequency, align, problem.map_experts)
        return merged_candidates(problem, grouping, merged)

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        return 2, 1  # groups form around the retained experts

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        logits = shape.number * sampled_tokens(shape) * shape.experts
        aligned = 3 * shape.number * (shape.expert + shape.width**2)  # weights of two experts, inner products
        averaged = average_groups_cost(shape)
        operations = 2.0 * (shape.experts - shape.retained) * shape.width * shape.expert
        return [Cost(sample_cost(shape).held + logits), Cost(averaged.held + aligned, averaged.experts, operations)]
