"""Closed-form fit of one output scale per retained expert.

If a router does not renormalise gate weights over the chosen experts (`norm_topk_prob=False`), dropping experts
removes their share of the softmax, so that the retained experts' gate weights grow, and with them the layer's output.
With C_i(x) the contribution of expert i, including its gate weight, and y the original layer's routed output, solve

    min  sum_x | y(x) - sum_i c_i C_i(x) |^2  +  lambda |c - 1|^2,        lambda = ridge * tr(A) / N

with A_ij = sum_x C_i . C_j, and multiply the output of expert i by c_i.
"""

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, Routing, expert_batches, expert_output
from ..layer.reduction import Reduce, alone
from ..layer.segments import Segments


__all__ = ["fit_scales_cost", "fit_scales", "scale_outputs"]


def fit_scales(
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    reduce: Reduce = alone,
    ridge: float = 1e-3,
) -> Tensor:
    """Fit the output scales c of one layer to a target output.

    Args:
        segments: N experts.
        routing: T tokens.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons.
        reduce: over the processes that share the tokens.
        ridge: relative to the mean eigenvalue of A.

    Returns:
        (N,) float64, 1 for an expert without tokens.
    """
    count, top_k = len(segments.up), routing.index.shape[1]
    gram = torch.zeros(count * count, dtype=torch.float64, device=target.device)
    right = gram.new_zeros(count)
    chunk = 2 * segments.workspace.chunk_tokens
    for part, wanted in zip(routing.chunks(chunk, count), target.split(chunk), strict=True):
        outputs = target.new_zeros(len(part.index), top_k, target.shape[1])  # (n, k, o)
        for batch in expert_batches(segments, part, activation):
            outputs[batch.token, batch.slot] = (batch.weight * expert_output(segments, batch)).to(outputs)
        residual = wanted - outputs.sum(1)
        pairs = part.index.unsqueeze(2) * count + part.index.unsqueeze(1)  # (n, k, k)
        gram.index_add_(0, pairs.flatten(), (outputs @ outputs.mT).double().flatten())
        right.index_add_(0, part.index.flatten(), (outputs @ residual.unsqueeze(2)).double().flatten())
    gram, right = reduce(gram).view(count, count), reduce(right)
    penalty = ridge * gram.trace() / count
    gram.diagonal().add_(torch.where(penalty > 0, penalty, 1.0))  # without any tokens the scales are 1
    solution, _ = torch.linalg.solve_ex(gram, right)
    return 1 + solution


def scale_outputs(segments: Segments, scales: Tensor) -> Segments:
    """Multiply the experts' outputs by scales (N,), through their down projections and output biases."""
    down = segments.workspace.copy(segments.down)
    for expert, scale in zip(down, scales, strict=True):
        expert *= scale.to(expert)
    bias = segments.output_bias
    return segments._replace(down=down, output_bias=None if bias is None else bias * scales.to(bias).unsqueeze(1))


def fit_scales_cost(shape: LayerShape) -> Cost:
    """Cost of `fit_scales` and `scale_outputs`."""
    tokens = min(2 * shape.chunk_tokens, shape.tokens)
    outputs = tokens * (shape.top_k + 3) * shape.outputs + 6 * tokens * shape.top_k**2
    copies = shape.retained * shape.down * shape.itemsize
    operations = experts_operations(shape) + 2.0 * shape.tokens * shape.top_k * (shape.top_k + 1) * shape.outputs
    return Cost(shape.number * outputs + held_by_chunk(shape), copies, operations)
