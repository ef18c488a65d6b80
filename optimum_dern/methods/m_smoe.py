"""M-SMoE (arXiv 2310.01334): experts that the router treats alike are aligned and averaged.

frequency     f_i  = share of the tokens that reach expert i
similarity    S_ij = cos(z_i, z_j), router logits over all tokens
groups        the N most frequent experts are dominant; every other joins the most similar dominant one
alignment     the permutation P of neurons that maximises <G_a, P G_b> + <U_a, P U_b> + <D_a, P D_b>
merge         frequency-weighted average; the router keeps the row of the dominant expert
"""

from torch import Tensor

from ..config import DernConfig
from ..core.alignment import match_neurons, weight_products
from ..core.all_experts import logit_cosines, router_logits, sample_tokens
from ..core.grouping import join_nearest
from ..core.merging import average_groups
from .merged import merged_candidates
from .registry import Candidate, LayerProblem, register_method


@register_method("m_smoe")
class MSmoe:
    """Merging of a sparse mixture of experts guided by its routing."""

    needs_router_logits = True

    def compress_layer(self, problem: LayerProblem, config: DernConfig) -> dict[str, Candidate]:
        layer = problem.layer
        similarity = logit_cosines(layer, router_logits(layer, sample_tokens(layer)))
        grouping = join_nearest(problem.retained, similarity, layer.num_groups)

        def align(dominant: int, member: int) -> Tensor:
            return match_neurons(-weight_products(layer.segments, dominant, member))

        frequency = layer.statistics.count
        merged = average_groups(layer.segments, grouping, frequency, align, problem.map_experts)
        return merged_candidates(problem, grouping, merged)
