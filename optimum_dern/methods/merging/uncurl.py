"""UNCURL (arXiv 2409.01483): merge the experts that a task's tokens route alike, clustered by their router logits.

similarity    S_ij = (1 + cos(z_i, z_j)) / 2, router logits over the calibration tokens, which are those of the task
groups        normalised spectral clustering of the experts into N clusters
alignment     the permutation P of neurons that maximises <G_a, P G_b> + <U_a, P U_b> + <D_a, P D_b>
merge         frequency-weighted average; the router keeps the row of the cluster's most frequent expert

The paper leaves open the affinity, the reference expert of an alignment, and the router's rows; these are our choices.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from ...core.layer.cost import Cost, LayerShape
from ...core.merging.alignment import match_neurons, weight_products
from ...core.merging.all_experts import logit_cosines, router_logits, sample_tokens
from ...core.merging.averaging import average_groups
from ...core.merging.grouping import cluster_by_cosine
from ...core.merging.spectral import spectral_embedding
from ..registry import Candidate, LayerProblem, merged_candidates, register_method
from .m_smoe import MSmoe


if TYPE_CHECKING:
    from ...config import DernConfig


@register_method("uncurl")
class Uncurl:
    """The UNCURL method: task-specific merging by spectral clustering of router logits."""

    needs_router_logits = True
    defaults = {"selection": "frequency"}
    options = ()

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        layer, places = problem.layer, problem.places
        similarity = (1 + logit_cosines(layer, router_logits(layer, sample_tokens(layer)))) / 2
        vectors = spectral_embedding(similarity, places.count, places.num_groups)
        grouping = cluster_by_cosine(vectors, problem.scores, places, config.seed)

        def align(reference: int, member: int) -> Tensor:
            return match_neurons(-weight_products(layer.segments, reference, member))

        merged = average_groups(layer.segments, grouping, layer.statistics.count, align, problem.map_experts)
        return merged_candidates(problem, grouping, merged)

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        return MSmoe().costs(shape, config)  # the same steps on tensors of the same shapes
