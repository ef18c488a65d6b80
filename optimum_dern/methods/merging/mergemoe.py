"""MergeMoE (arXiv 2510.14436): average experts, then fit their down projections to the group's mean output.

groups        the N most frequent experts are centres; every other joins the centre of the highest cosine of U|G
merge         b_i = f_i / sum of the group's f;   G' = sum b_i G_i,   U' = sum b_i U_i
output        P = act(G' X) * (U' X),   Q = sum b_i e_i(X);   D' = Q P^+
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.layer.cost import Cost, LayerShape
from ...core.layer.segments import Segments
from ...core.merging.all_experts import sample_cost, sample_tokens, sampled_tokens
from ...core.merging.averaging import average_groups, average_groups_cost, fit_group_outputs, fit_group_outputs_cost
from ...core.merging.grouping import join_nearest
from ..registry import Candidate, LayerProblem, merged_candidates, register_method


if TYPE_CHECKING:
    from ...config import DernConfig


MAX_ELEMENTS = 1 << 24  # weights converted at once


@register_method("mergemoe")
class MergeMoe:
    """The MergeMoE method: merging by expert outputs."""

    defaults = {"selection": "frequency"}
    options = ()

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        layer, frequency = problem.layer, problem.layer.statistics.count
        grouping = join_nearest(problem.retained, input_similarity(layer.segments), layer.num_groups)
        averaged = average_groups(layer.segments, grouping, frequency)
        merged = fit_group_outputs(layer, sample_tokens(layer), grouping, frequency, averaged)
        return merged_candidates(problem, grouping, merged)

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        return 2, 1  # groups form around the retained experts

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        averaged, fitted = average_groups_cost(shape), fit_group_outputs_cost(shape, sampled_tokens(shape))
        rows = min(MAX_ELEMENTS, shape.experts * shape.width * shape.inputs)
        similarity = rows * (shape.number + (shape.itemsize if shape.itemsize < shape.number else 0))
        return [
            Cost(similarity, 0, 2.0 * shape.experts**2 * (shape.expert - shape.down)),
            averaged,
            Cost(sample_cost(shape).held + fitted.held, averaged.experts + fitted.experts, fitted.operations),
        ]


def input_similarity(segments: Segments) -> Tensor:
    """Compute the cosines (E, E) of experts' gate and up projections, flattened into one vector per expert."""
    num_experts, _, inputs = segments.up.shape
    gram = segments.up.new_zeros(num_experts, num_experts, dtype=torch.float64)
    for part in (segments.gate, segments.up):
        for rows in () if part is None else part.split(max(1, MAX_ELEMENTS // (num_experts * inputs)), dim=1):
            rows = rows.flatten(1).to(segments.compute_dtype)
            gram += (rows @ rows.T).double()
    norms = gram.diagonal().sqrt()
    return gram / (norms.unsqueeze(1) * norms).clamp(min=1e-300)
