"""Closed-form fit of the experts' output biases, where a family has them (gpt-oss).

After experts are dropped, the layer's output lacks what they added on average, which biases can give back: MoNE (arXiv
2507.00390) puts a constant in a dropped expert's place.  With weights g of the retained experts, their output F_S and
the original layer's output F, solve

    min  sum_x | F(x) - F_S(x) - sum_i g_i(x) c_i |^2  +  lambda sum_i |c_i|^2,        lambda = ridge * tr(A) / N

with A_ij = sum_x g_i g_j, and add c_i to the bias of expert i.
"""

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, Routing, routed_output
from ..layer.reduction import Reduce, alone
from ..layer.segments import Segments


__all__ = ["fit_output_biases", "fit_output_biases_cost"]


def fit_output_biases(
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    reduce: Reduce = alone,
    ridge: float = 1e-2,
) -> Segments:
    """Refit the output biases of one layer to a target output.

    Args:
        segments: N experts with output biases.
        routing: T tokens.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons.
        reduce: over the processes that share the tokens.
        ridge: relative to the mean eigenvalue of A.

    Returns:
        The segments with other biases; an expert without tokens keeps its own.
    """
    count = len(segments.up)
    gram = torch.zeros(count, count, dtype=torch.float64, device=target.device)
    right = gram.new_zeros(count, target.shape[1])
    chunk = 2 * segments.workspace.chunk_tokens
    for part, wanted in zip(routing.chunks(chunk, count), target.split(chunk), strict=True):
        residual = (wanted - routed_output(segments, part, activation)).double()
        given = torch.ones_like(part.weight) if part.weighs_input else part.weight
        weights = gram.new_zeros(len(residual), count).scatter_(1, part.index, given.double())  # (n, N)
        gram += weights.T @ weights
        right += weights.T @ residual
    gram, right = reduce(gram), reduce(right)
    penalty = ridge * gram.trace() / count
    gram.diagonal().add_(torch.where(penalty > 0, penalty, 1.0))  # without any tokens the biases stay
    added, _ = torch.linalg.solve_ex(gram, right)
    return segments._replace(output_bias=segments.output_bias + added.to(segments.output_bias))


def fit_output_biases_cost(shape: LayerShape) -> Cost:
    """Cost of `fit_output_biases`."""
    tokens = min(2 * shape.chunk_tokens, shape.tokens)
    held = 8 * tokens * (2 * shape.outputs + shape.retained) + held_by_chunk(shape)
    operations = 2.0 * shape.tokens * shape.retained * (shape.retained + shape.outputs)
    return Cost(held, 0, experts_operations(shape) + operations)
