"""Activations, outputs and router logits of all experts on the same tokens, routed to them or not.

Merging methods compare experts on identical inputs, without gate weights that scale the inputs (as in Llama 4).
Running all experts costs E/k times the routed forward pass, so it is done on a sample of the tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, held_by_chunk
from ..layer.mixture import neuron_activations
from ..layer.observation import ObservedLayer
from .sampling import sampled


__all__ = [
    "activation_cosines_cost",
    "mean_outputs_cost",
    "sample_cost",
    "sampled_tokens",
    "MAX_TOKENS",
    "activation_cosines",
    "all_neurons",
    "logit_cosines",
    "mean_outputs",
    "router_logits",
    "sample_tokens",
]

MAX_TOKENS = 16384


def sample_tokens(layer: ObservedLayer, limit: int = MAX_TOKENS) -> Tensor:
    """Sample evenly spaced calibration tokens that are not held out; independent of the number of processes.

    Args:
        layer: observed on T tokens.
        limit: most tokens of all processes together.

    Returns:
        (n, d) hidden states of this process's sampled tokens, in the compute dtype of the experts.
    """
    return layer.routing.hidden[sampled(layer, limit)].to(layer.segments.compute_dtype)


def router_logits(layer: ObservedLayer, hidden: Tensor) -> Tensor:
    """Compute the router logits z(x) = W x (+ bias) of all experts: (n, E).

    Raises:
        ValueError: the router has no single matrix that reads what the experts read.
    """
    rows = layer.router_rows
    if rows is None or rows.shape[1] != hidden.shape[1]:
        found = (
            "no single matrix" if rows is None else f"{rows.shape[1]} inputs where the experts have {hidden.shape[1]}"
        )
        raise ValueError(
            f"this method compares the experts' router logits, but the router has {found}; "
            "choose method hc_smoe, mergemoe or sub_moe"
        )
    logits = hidden @ rows.to(hidden).T
    return logits if layer.router_bias is None else logits + layer.router_bias.to(logits)


def logit_cosines(layer: ObservedLayer, logits: Tensor) -> Tensor:
    """Compute the cosines (E, E) of experts' router logits, as vectors over the tokens of all processes."""
    gram = layer.reduce((logits.T @ logits).double())
    norms = gram.diagonal().sqrt()
    return gram / (norms.unsqueeze(1) * norms).clamp(min=1e-300)


def all_neurons(layer: ObservedLayer, expert: int, hidden: Tensor) -> Iterator[Tensor]:
    """Compute one expert's neuron activations (m, f) on all inputs (n, d), one chunk of tokens at a time."""
    size = layer.segments.workspace.chunk_tokens
    for chunk in hidden.split(size) if len(hidden) else ():  # all tokens of a process may be held out
        yield neuron_activations(layer.segments, expert, chunk, layer.activation)


def mean_outputs(layer: ObservedLayer, hidden: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the mean output of every expert over the tokens, optionally weighted.

    Args:
        layer: with E experts.
        hidden: (n, d) inputs of this process.
        weights: (n, E); ones by default.

    Returns:
        (E, o) float64, over the tokens of all processes.
    """
    segments = layer.segments
    weights = hidden.new_ones(len(hidden), len(segments.up)) if weights is None else weights
    neurons = torch.zeros(*segments.up.shape[:2], dtype=torch.float64, device=hidden.device)
    chunk = segments.workspace.chunk_tokens
    for expert in range(len(neurons)):
        for own, part in zip(weights[:, expert].split(chunk), all_neurons(layer, expert, hidden), strict=False):
            neurons[expert] += (own @ part).double()  # the down projection is linear: applied to the sum
    count = layer.reduce(torch.tensor(len(hidden), dtype=torch.float64, device=hidden.device)).clamp(min=1)
    neurons, share = layer.reduce(neurons) / count, layer.reduce(weights.double().sum(0)) / count
    outputs = [sums @ segments.down[expert].double() for expert, sums in enumerate(neurons)]
    bias = 0.0 if segments.output_bias is None else share.unsqueeze(1) * segments.output_bias.double()
    return torch.stack(outputs) + bias


def activation_cosines(layer: ObservedLayer, hidden: Tensor, first: int, second: int) -> Tensor:
    """Compute the cosines between two experts' neuron activations, as vectors over the tokens of all processes.

    Args:
        layer: with experts of width f.
        hidden: (n, d) inputs of this process; the vectors go over the tokens of all processes.
        first: expert of the rows.
        second: expert of the columns.

    Returns:
        (f, f) float64, 0 for neurons that never fire.
    """
    width = layer.segments.up.shape[1]
    cross = torch.zeros(width, width, dtype=torch.float64, device=hidden.device)
    squares = cross.new_zeros(2, width)
    for rows, columns in zip(all_neurons(layer, first, hidden), all_neurons(layer, second, hidden), strict=True):
        cross += (rows.T @ columns).double()
        squares += torch.stack([rows.square().sum(0), columns.square().sum(0)]).double()
    norms = layer.reduce(squares).sqrt()
    return layer.reduce(cross) / (norms[0].unsqueeze(1) * norms[1]).clamp(min=1e-300)


def sampled_tokens(shape: LayerShape) -> int:
    """Return the approximate number of tokens that `sample_tokens` selects."""
    return min(shape.tokens, MAX_TOKENS)


def sample_cost(shape: LayerShape) -> Cost:
    """Cost of `sample_tokens`: its result and a temporary copy."""
    return Cost((shape.number * sampled_tokens(shape) + shape.itemsize * shape.tokens) * shape.inputs)


def mean_outputs_cost(shape: LayerShape) -> Cost:
    """Cost of `mean_outputs` on a sample: all experts on all tokens, without their down projections."""
    tokens = sampled_tokens(shape)
    weights = shape.number * tokens * shape.experts + 8 * shape.experts * (shape.width + shape.outputs)
    operations = 2.0 * tokens * shape.experts * (shape.expert - shape.down + shape.width)
    return Cost(weights + 8 * shape.down + held_by_chunk(shape._replace(tokens=tokens)), 0, operations)


def activation_cosines_cost(shape: LayerShape) -> Cost:
    """Cost of `activation_cosines` for two experts on a sample."""
    tokens = sampled_tokens(shape)
    operations = 2.0 * tokens * (2 * (shape.expert - shape.down) + shape.width**2)
    chunk = min(shape.chunk_tokens, tokens) * (2 * shape.projections - 1) * shape.width  # the first one's neurons stay
    return Cost(shape.number * chunk + 3 * 8 * shape.width**2, 0, operations)
