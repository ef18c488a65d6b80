"""Sub-MoE (arXiv 2506.23266): merge experts with similar mean outputs in a shared subspace of their weights.

    groups        k-means (k-means++) of the experts' mean outputs by cosine
    union         [W_1 .. W_m] = U S [V_1 .. V_m]^T for each projection of a group
    merge         V = sum f_i V_i / sum f_i,   W' = U S V^T

At full rank, as published, the union decomposition cancels: W' = sum f_i (U S V_i^T) / sum f_i, the frequency-weighted
average of the W_i.  So no decomposition is computed here; a test carries one out and finds the same experts.
"""

from typing import TYPE_CHECKING

from ...core.layer.cost import Cost, LayerShape
from ...core.merging.all_experts import mean_outputs, mean_outputs_cost, sample_cost, sample_tokens
from ...core.merging.averaging import average_groups, average_groups_cost
from ...core.merging.grouping import cluster_by_cosine
from ..registry import Candidate, LayerProblem, merged_candidates, register_method


if TYPE_CHECKING:
    from ...config import DernConfig


@register_method("sub_moe")
class SubMoe:
    """The Sub-MoE method: subspace expert merging."""

    defaults = {"selection": "frequency"}
    options = ()

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        layer = problem.layer
        vectors = mean_outputs(layer, sample_tokens(layer))
        grouping = cluster_by_cosine(vectors, problem.scores, problem.places, config.seed)
        merged = average_groups(layer.segments, grouping, layer.statistics.count)
        return merged_candidates(problem, grouping, merged)

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        means = mean_outputs_cost(shape)
        return [means._replace(held=sample_cost(shape).held + means.held), average_groups_cost(shape)]
