"""HC-SMoE (arXiv 2410.08589): merge experts by hierarchical clustering of their mean outputs, ignoring the router.

vector        v_i = mean over all tokens of e_i
groups        agglomerative clustering of the v_i, Euclidean distance, average linkage, down to N clusters
merge         frequency-weighted average, without neuron alignment
"""

from typing import TYPE_CHECKING

from ...core.layer.cost import Cost, LayerShape
from ...core.merging.all_experts import mean_outputs, mean_outputs_cost, sample_cost, sample_tokens
from ...core.merging.averaging import average_groups, average_groups_cost
from ...core.merging.grouping import link_by_average
from ..registry import Candidate, LayerProblem, merged_candidates, register_method


if TYPE_CHECKING:
    from ...config import DernConfig


@register_method("hc_smoe")
class HcSmoe:
    """The HC-SMoE method: hierarchical clustering for sparse MoE."""

    defaults = {"selection": "frequency"}
    options = ()

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        layer = problem.layer
        grouping = link_by_average(mean_outputs(layer, sample_tokens(layer)), problem.scores, problem.places)
        merged = average_groups(layer.segments, grouping, layer.statistics.count)
        return merged_candidates(problem, grouping, merged)

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        means = mean_outputs_cost(shape)
        return [means._replace(held=sample_cost(shape).held + means.held), average_groups_cost(shape)]
