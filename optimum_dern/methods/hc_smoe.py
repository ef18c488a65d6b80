"""HC-SMoE (arXiv 2410.08589): hierarchical clustering of experts by what they put out, whatever the router does.

vector        v_i = mean over all tokens of e_i
groups        agglomerative clustering of the v_i, Euclidean distance, average linkage, down to N clusters
merge         frequency-weighted average, neurons in the order that they have
"""

from ..config import DernConfig
from ..core.all_experts import mean_outputs, sample_tokens
from ..core.grouping import link_by_average
from ..core.merging import average_groups
from .merged import merged_candidates
from .registry import Candidate, LayerProblem, register_method


@register_method("hc_smoe")
class HcSmoe:
    """Retraining-free merging by hierarchical clustering."""

    def compress_layer(self, problem: LayerProblem, config: DernConfig) -> dict[str, Candidate]:
        layer = problem.layer
        vectors = mean_outputs(layer, sample_tokens(layer))
        count, scores = len(problem.retained), problem.scores
        grouping = link_by_average(vectors, count, scores, layer.num_groups, problem.protected)
        merged = average_groups(layer.segments, grouping, layer.statistics.count)
        return merged_candidates(problem, grouping, merged)
