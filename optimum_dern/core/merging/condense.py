"""Greedy search of the few experts whose fixed sum is closest to a layer's output (CD-MoE, arXiv 2412.00069).

A token's routed output F(x) is replaced by the same sum for all tokens, sum over S of w_i e_i(x), with w_i the mean
gate weight of the tokens routed to expert i.  With s(x) what the block adds beside, its shared experts' output, S
grows by the expert that makes

    mean over tokens of JS( softmax(s(x) + F(x)) || softmax(s(x) + sum_S w_i e_i(x)) )

least, the softmax over the hidden dimension; JS is the Jensen-Shannon divergence.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ..layer.cost import Cost, LayerShape, held_by_chunk
from ..layer.mixture import neuron_activations
from ..layer.observation import ObservedLayer
from .sampling import sampled


__all__ = ["condense_experts", "condense_experts_cost", "jensen_shannon", "mean_weights"]

TOKENS = 2048  # on which experts are compared, of all processes together


def condense_experts(layer: ObservedLayer, count: int, protected: Sequence[int] = ()) -> list[int]:
    """Search the experts whose fixed weighted sum is closest to the layer's output.

    Args:
        layer: with E experts, whose gate weights scale outputs; the whole block's outputs are compared where it has
            what they get `beside`.
        count: how many.
        protected: experts that are chosen first, in any case.

    Returns:
        Their indices, in the order in which they were chosen.
    """
    tokens = sampled(layer, TOKENS)
    hidden, target = layer.routing.hidden[tokens].to(layer.segments.compute_dtype), layer.target[tokens]
    weights, total = mean_weights(layer), torch.zeros_like(target, dtype=layer.segments.compute_dtype)
    if layer.beside is not None:
        total = layer.beside[tokens].to(total)
        target = target + total
    chosen: list[int] = []
    for forced in (*protected, *[None] * (count - len(protected))):
        found = torch.full_like(weights, torch.inf)
        for expert in (e for e in range(len(weights)) if e not in chosen and forced in (None, e)):
            sums = total + weights[expert].to(total) * _output(layer, expert, hidden)
            found[expert] = jensen_shannon(target, sums).sum(dtype=torch.float64)
        best = int(layer.reduce(found).argmin())  # of equals the first
        total = total + weights[best].to(total) * _output(layer, best, hidden)
        chosen.append(best)
    return chosen


def mean_weights(layer: ObservedLayer) -> Tensor:
    """Return the mean gate weight (E,) float64 of the tokens routed to each expert; 0 without tokens."""
    statistics = layer.statistics
    return statistics.weight / statistics.count.clamp(min=1)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of the softmax of two outputs (n, o), per token: (n,)."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    p, q = (log_softmax(part.to(dtype), dim=1) for part in (first, second))
    mean = torch.logaddexp(p, q) - math.log(2)
    halves = [kl_div(mean, part, reduction="none", log_target=True).sum(1) for part in (p, q)]
    return (halves[0] + halves[1]) / 2


def _output(layer: ObservedLayer, expert: int, hidden: Tensor) -> Tensor:
    neurons = neuron_activations(layer.segments, expert, hidden, layer.activation)
    output = neurons @ layer.segments.down[expert].to(neurons)
    bias = layer.segments.output_bias
    return output if bias is None else output + bias[expert].to(output)


def condense_experts_cost(shape: LayerShape) -> Cost:
    """Cost of `condense_experts`."""
    tokens = -(-shape.tokens // max(1, -(-shape.tokens // TOKENS)))  # every second, third, ... of them
    held = shape.number * tokens * (shape.inputs + 7 * shape.outputs) + held_by_chunk(shape._replace(tokens=tokens))
    return Cost(held, 0, 2.0 * tokens * shape.expert * shape.experts * shape.retained)
