"""Refit of the retained experts' gate and up projections: what their neurons listen to.

Tokens of dropped experts now reach experts whose neurons were never tuned to them.  With routing and down projections
fixed, the neurons are linearised around their present weights, h(x) -> h(x) + a * (dG x) + b * (dU x), where a and b
are the derivatives of the activation by the gate and up pre-activations, and one Gauss-Newton step solves

    min  sum_x | y(x) - y'(x) - sum_i g_i D_i (a_i * (dG_i x) + b_i * (dU_i x)) |^2  +  lambda (|dG|^2 + |dU|^2)

by conjugate gradients over all experts of the layer together; where g_i scales the expert's input instead, x is g_i x
and the g_i outside are 1.  Each iteration costs two passes over the tokens.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .conjugate_gradients import conjugate_gradients
from .mixture import Activation, ExpertBatch, Routing, expert_batches, expert_inputs, expert_output
from .reduction import Reduce, alone
from .segments import Segments


__all__ = ["refit_neurons"]

MAX_ELEMENTS = 1 << 26  # numbers kept between iterations: 256 MiB in float32
LinearisedBatch = tuple[ExpertBatch, Tensor, tuple[Tensor, ...]]  # with inputs (n, d) and slopes (n, f)


def refit_neurons(
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    ridge: float,
    iterations: int = 8,
    tolerance: float = 1e-3,
    reduce: Reduce = alone,
) -> Segments:
    """One Gauss-Newton step of the gate and up projections towards a target output.

    Args:
        segments: N experts.
        routing: T tokens.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons, elementwise in the neurons.
        ridge: relative to the mean diagonal of the normal equations.
        iterations: of conjugate gradients, at most; stopping early regularises too.
        tolerance: relative residual that ends them.
        reduce: over the processes that share the tokens.

    Returns:
        Segments with new gate and up projections.
    """
    residual = target.to(segments.compute_dtype, copy=True)
    batches = _linearised_batches(segments, routing, activation)
    for batch, _, _ in batches():
        residual[batch.token] -= batch.weight * expert_output(segments, batch)
    parts = [part for part in (segments.gate, segments.up) if part is not None]

    def transposed(output: Tensor) -> Tensor:
        """J^T of an output (T, o): (parts, N, f, d)."""
        step = torch.zeros(len(parts), *segments.up.shape, dtype=output.dtype, device=output.device)
        for batch, hidden, slopes in batches():
            pull = batch.weight * (output[batch.token] @ segments.down[batch.expert].to(output).T)  # (n, f)
            for position, slope in enumerate(slopes):
                step[position, batch.expert] += (slope * pull).T @ hidden
        return reduce(step)

    def normal(step: Tensor) -> Tensor:
        """J^T J of a step."""
        output = torch.zeros_like(residual)
        for batch, hidden, slopes in batches():
            change = sum(slope * (hidden @ step[i, batch.expert].T) for i, slope in enumerate(slopes))  # (n, f)
            output[batch.token] += batch.weight * (change @ segments.down[batch.expert].to(output))
        return transposed(output)

    penalty = ridge * _mean_diagonal(segments, batches, len(parts), reduce)
    if not penalty > 0:
        return segments
    right = transposed(residual)
    step = conjugate_gradients(lambda v: normal(v) + penalty * v, right, iterations, tolerance, reduce)
    up = segments.up + step[-1]
    return segments._replace(gate=None if segments.gate is None else segments.gate + step[0], up=up)


def _linearised_batches(
    segments: Segments, routing: Routing, activation: Activation
) -> Callable[[], Iterable[LinearisedBatch]]:
    """A walk over all experts' batches: kept in memory where they fit, computed anew each time where not."""

    def compute() -> Iterator[LinearisedBatch]:
        for batch in expert_batches(segments, routing, activation):
            hidden = expert_inputs(segments, routing.inputs(batch.token, batch.slot, segments.compute_dtype))
            yield batch, hidden, _slopes(segments, batch.expert, hidden, activation)

    _, width, inputs = segments.up.shape
    if routing.index.numel() * (3 * width + inputs) > MAX_ELEMENTS:  # neurons, two slopes, inputs
        return compute
    kept = list(compute())
    return lambda: kept


def _slopes(segments: Segments, expert: int, hidden: Tensor, activation: Activation) -> tuple[Tensor, ...]:
    """Derivatives of the neurons by gate (where there is one) and up pre-activations, each (n, f)."""
    parts = [part[expert].to(hidden.dtype) for part in (segments.gate, segments.up) if part is not None]
    with torch.enable_grad():
        inputs = [(hidden @ part.T).detach().requires_grad_() for part in parts]
        neurons = activation(*(inputs if segments.gate is not None else (None, *inputs)))
        return torch.autograd.grad(neurons.sum(), inputs)


def _mean_diagonal(
    segments: Segments, batches: Callable[[], Iterable[LinearisedBatch]], parts: int, reduce: Reduce
) -> float:
    """Mean diagonal entry of J^T J."""
    total = 0.0
    for batch, hidden, slopes in batches():
        energy = segments.down[batch.expert].to(hidden.dtype).square().sum(1)  # (f,)
        length = (batch.weight.squeeze(1) ** 2) * hidden.square().sum(1)  # (n,)
        total += sum((length @ slope.square() * energy).sum().item() for slope in slopes)
    total = reduce(torch.tensor(total, dtype=torch.float64, device=segments.up.device)).item()
    return total / (parts * segments.up.numel())
