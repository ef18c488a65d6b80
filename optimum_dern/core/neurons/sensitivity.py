"""Sensitivity of neurons: their weights times the gradients of a loss by them, summed without signs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, Routing, expert_batches, expert_inputs
from ..layer.segments import Segments
from ..layer.traced import TracedActivation
from .statistics import neuron_gradients


__all__ = ["add_weight_gradients_", "sensitivity", "sensitivity_cost", "zero_gradients"]


def zero_gradients(segments: Segments) -> list[Tensor]:
    """Allocate a gradient for each of a layer's projections, zero, in the dtype of computations."""
    return [segments.workspace.empty_like(part, dtype=segments.compute_dtype).zero_() for part in segments.parts]


def add_weight_gradients_(
    gradients: Sequence[Tensor], segments: Segments, routing: Routing, activation: Activation, gradient: Tensor
) -> None:
    """Add the gradients of a loss by the projections over one batch of tokens.

    Args:
        gradients: of `segments.parts`, added to.
        segments: E experts.
        routing: T tokens.
        activation: the model's rule from pre-activations to neurons.
        gradient: (T, o) of the loss by the layer's routed output.
    """
    traced, dtype = TracedActivation(activation), segments.compute_dtype
    for number, batch in enumerate(expert_batches(segments, routing, traced)):
        pulled = traced.pull_back(number, neuron_gradients(segments, batch, gradient))  # (n, f) each
        inputs = expert_inputs(segments, routing.inputs(batch.token, batch.slot, dtype))
        for part, by_row in zip(gradients, pulled, strict=False):
            part[batch.expert].addmm_(by_row.T, inputs)
        gradients[-1][batch.expert].addmm_(batch.neurons.T, batch.weight * gradient[batch.token].to(dtype))


def sensitivity(segments: Segments, gradients: Sequence[Tensor]) -> Tensor:
    """Compute the sum of |weight x gradient| over every neuron's gate, up and down weights.

    Args:
        segments: E experts of f neurons.
        gradients: of `segments.parts`, over all tokens.

    Returns:
        (E, f) float64.
    """
    pairs = list(zip(segments.parts, gradients, strict=True))
    return torch.stack(
        [
            sum((part[expert] * by[expert]).abs().sum(-1, dtype=torch.float64) for part, by in pairs)
            for expert in range(len(segments.up))
        ]
    )


def sensitivity_cost(shape: LayerShape) -> Cost:
    """Cost of the gradients of all weights."""
    return Cost(2 * held_by_chunk(shape), shape.number * shape.experts * shape.expert, 2 * experts_operations(shape))
