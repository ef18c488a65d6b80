"""Merge every group of experts into one expert by averaging its weights.

average   W' = sum_i w_i P_i W_i / sum_i w_i            P_i puts the neurons into the representative's order
output    D' = argmin sum_x | sum_i w_i e_i(x) - D' h'(x) |^2,   h' the neurons of the averaged expert
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..dern.recombination import Map
from ..layer.cost import Cost, LayerShape, held_by_chunk
from ..layer.observation import ObservedLayer
from ..layer.segments import Segments
from .all_experts import all_neurons
from .grouping import Grouping


__all__ = ["average_groups_cost", "fit_group_outputs_cost", "Align", "average_groups", "fit_group_outputs", "shares"]

RIDGE = 1e-6  # relative to a Gram matrix's mean eigenvalue; only directions without data stay at the average
Align = Callable[[int, int], Tensor]  # (representative, member) -> permutation (f,) of the member's neurons


def shares(weights: Tensor, members: list[int]) -> list[float]:
    """Normalise the weights of a group's members to sum 1; equal weights if all are 0."""
    own = weights.double().cpu()[members]
    own = own if own.sum() > 0 else torch.ones_like(own)
    return (own / own.sum()).tolist()


def average_groups(
    segments: Segments, grouping: Grouping, weights: Tensor, align: Align | None = None, map_experts: Map = map
) -> Segments:
    """Average the weights of the experts in every group.

    Args:
        segments: E experts.
        grouping: of them, into N groups.
        weights: (E,) >= 0; a group whose weights are all 0 is averaged evenly.
        align: computes the permutation that aligns a member's neurons with its representative's; by default none.
        map_experts: as in `recombination.recombine_layer`; only where `align` sums over no tokens.

    Returns:
        N experts.  A group of one is returned bit for bit.
    """

    def average(position: int) -> tuple[Tensor, ...]:
        members = grouping.members(position)
        total: list[Tensor | None] = [None, None, None, None]
        for expert, share in zip(members, shares(weights, members), strict=True):
            order = slice(None) if align is None or expert == members[0] else align(members[0], expert)
            rows = [None if part is None else part[expert][order] for part in segments[:3]]
            rows += [None if segments.output_bias is None else segments.output_bias[expert]]
            for i, row in enumerate(rows):
                if row is not None:
                    term = share * row.to(segments.compute_dtype)
                    total[i] = term if total[i] is None else total[i] + term
        return tuple(part for part in total if part is not None)

    result = segments.select(grouping.retained)  # indexing copies: the input stays as it was
    merged = [p for p in range(len(grouping.retained)) if len(grouping.members(p)) > 1]
    parts = [part for part in result[:4] if part is not None]
    for position, averages in zip(merged, map_experts(average, merged), strict=True):
        for part, value in zip(parts, averages, strict=True):
            part[position] = value
    return result


def fit_group_outputs(
    layer: ObservedLayer, hidden: Tensor, grouping: Grouping, weights: Tensor, merged: Segments
) -> Segments:
    """Refit the down projections of averaged experts to the weighted mean of their members' outputs.

    Args:
        layer: with E experts.
        hidden: (n, d) inputs of this process, which all experts of a group are given.
        grouping: into N groups.
        weights: (E,) as in `average_groups`.
        merged: N averaged experts; their output biases stay.

    Returns:
        N experts; what the tokens do not determine of a down projection stays as it was.
    """
    down = merged.workspace.copy(merged.down)
    for position in range(len(grouping.retained)):
        members = grouping.members(position)
        if len(members) > 1:
            down[position] = _fitted_down(layer, hidden, members, shares(weights, members), merged, position)
    return merged._replace(down=down)


def _fitted_down(
    layer: ObservedLayer, hidden: Tensor, members: list[int], share: list[float], merged: Segments, position: int
) -> Tensor:
    """Compute the refitted down projection D' (f, o) of one group."""
    before = merged.down[position].double()  # (f, o)
    bias = 0.0 if merged.output_bias is None else merged.output_bias[position].to(hidden)

    def output(expert: int, neurons: Tensor) -> Tensor:
        result = neurons @ layer.segments.down[expert].to(neurons)
        return result if layer.segments.output_bias is None else result + layer.segments.output_bias[expert]

    gram, right = before.new_zeros(len(before), len(before)), torch.zeros_like(before)
    chunks = zip(
        *(all_neurons(layer, expert, hidden) for expert in members),
        all_neurons(replace(layer, segments=merged), position, hidden),
        strict=True,
    )
    for *sources, neurons in chunks:  # (m, f) each
        target = sum(w * output(expert, h) for w, expert, h in zip(share, members, sources, strict=True)) - bias
        gram += (neurons.T @ neurons).double()
        right += (neurons.T @ target).double()
    gram, right = layer.reduce(gram), layer.reduce(right)
    penalty = RIDGE * gram.trace() / len(gram)
    if not penalty > 0:  # no token, or no neuron that fires
        return before
    residual = right - gram @ before
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    while failed:  # fewer tokens than neurons: rounding in float32 has made eigenvalues negative that should be 0
        gram.diagonal().add_(9 * penalty)
        penalty *= 10
        factor, failed = torch.linalg.cholesky_ex(gram)
    return before + torch.cholesky_solve(residual, factor)


def average_groups_cost(shape: LayerShape) -> Cost:
    """Cost of `average_groups`, without neuron alignment."""
    return Cost(3 * shape.number * shape.expert, shape.retained * shape.expert * shape.itemsize)


def fit_group_outputs_cost(shape: LayerShape, tokens: int) -> Cost:
    """Cost of `fit_group_outputs` on this many tokens, for groups of equal size."""
    members = -(-shape.experts // shape.retained)
    chunk = min(shape.chunk_tokens, tokens)
    held = 8 * (3 * shape.width**2 + 4 * shape.down) + shape.number * chunk * members * (shape.width + shape.outputs)
    operations = 2.0 * tokens * (shape.experts + shape.retained) * shape.expert
    operations += 2.0 * tokens * shape.retained * shape.width * (shape.width + shape.outputs)
    copies = shape.retained * shape.down * shape.itemsize
    return Cost(held + held_by_chunk(shape._replace(tokens=tokens)), copies, operations)
