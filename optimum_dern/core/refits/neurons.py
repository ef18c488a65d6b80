"""Refit of the retained experts' gate, up and down projections by minibatch gradient descent.

Tokens of dropped experts are now routed to experts that were not trained on them.  With the routing fixed, all three
projections of all retained experts are updated together along the gradient of

    sum_x | y(x) - sum_i g_i D_i h_i(x) |^2,        h_i(x) = act(G_i x) * (U_i x)

over minibatches of calibration tokens, with Adam steps (arXiv 1412.6980) on a cosine schedule.  With r the
residual, a and b the derivatives of the activation by the gate and up pre-activations, and p_i = g_i D_i^T r,

    dG_i = - (a_i * p_i) x^T        dU_i = - (b_i * p_i) x^T        dD_i = - r (g_i h_i)^T

are written out, so that autograd is needed for the activation only and an expert's gradient is freed once the expert
is updated.  Steps are relative to the size of the weights, so they fit every model.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations
from ..layer.mixture import Activation, Routing, expert_batches, expert_inputs, expert_output
from ..layer.reduction import Reduce, alone, largest
from ..layer.segments import Segments


__all__ = ["refit_neurons_cost", "count_passes", "count_steps", "refit_neurons"]

MOST_PASSES, FEWEST_PASSES = 12, 2  # over the tokens
ENOUGH_TOKENS = 1_500_000  # in all passes together: with more tokens, fewer passes are enough
BATCH_TOKENS = 1024
STEPS_PER_PASS = 32  # at least; batches are smaller if tokens are few
SMALLEST_BATCH = 64
MOMENTUM, SMOOTHING = 0.9, 0.99  # decay of the running means of the gradient and of its square
DAMPING = 0.1  # limits the step of weights whose gradient is small compared with their expert's


class Moving(NamedTuple):
    """A projection being optimised, with its Adam state."""

    value: Tensor  # (N, f, d) or (N, f, o)
    gradient: Tensor  # running mean of the gradient
    square: Tensor  # running mean of the squared gradient
    size: float  # root mean square of the projection at the start


def count_passes(tokens: int) -> int:
    """Return the number of passes over this many tokens."""
    return max(FEWEST_PASSES, min(MOST_PASSES, ENOUGH_TOKENS // max(tokens, 1)))


def count_steps(tokens: int) -> int:
    """Return the number of minibatches in a pass over this many tokens."""
    return max(1, tokens // BATCH_TOKENS, min(STEPS_PER_PASS, tokens // SMALLEST_BATCH))


def refit_neurons(
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    passes: int | None = None,
    rate: float = 0.05,
    order: Tensor | None = None,
    reduce: Reduce = alone,
    seed: int = 0,
) -> Segments:
    """Refit gate, up and down projections to a target output by minibatch gradient descent.

    Args:
        segments: N experts.
        routing: T tokens.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons, elementwise in the neurons.
        passes: over the tokens; by default `count_passes` of their number.
        rate: of the first steps, relative to the size of the weights.
        order: (T,) distinct numbers of the tokens, among those of all processes; by default 0 to T - 1.
        reduce: over the processes that share the tokens.
        seed: of the minibatches, which do not depend on the distribution of tokens over processes.

    Returns:
        Segments with new projections.
    """
    order = torch.arange(len(target)) if order is None else order.cpu()
    moving = [_moving(part, segments) for part in segments.parts]
    total = int(reduce(torch.tensor(len(target), device=target.device)))
    passes = count_passes(total) if passes is None else passes
    steps = passes * count_steps(total)
    for step, tokens in enumerate(_minibatches(order, steps, passes, target.device, reduce, seed), start=1):
        length = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        current = _with_parts(segments, moving)
        own = _gradients(current, routing.select(tokens), target[tokens], activation)
        for expert, gradients in _reduced(own, segments.workspace.max_elements, reduce):
            for part, gradient in zip(moving, gradients, strict=True):
                _move(part, expert, gradient, length, step)
    return _with_parts(segments, moving)


def _moving(part: Tensor, segments: Segments) -> Moving:
    value = segments.workspace.copy(part, segments.compute_dtype)
    gradient, square = (segments.workspace.empty_like(value).zero_() for _ in range(2))
    size = (sum(expert.square().sum().item() for expert in value) / value.numel()) ** 0.5
    return Moving(value, gradient, square, size)


def _with_parts(segments: Segments, moving: list[Moving]) -> Segments:
    *gate, up, down = (part.value for part in moving)
    return segments._replace(gate=gate[0] if gate else None, up=up, down=down)


def _minibatches(
    order: Tensor, steps: int, passes: int, device: torch.device, reduce: Reduce, seed: int
) -> Iterator[Tensor]:
    """Yield this process's tokens of each minibatch; every pass visits every token once."""
    total = int(largest(order.to(device), reduce)) + 1
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        turn = torch.randperm(total, generator=generator)[order] * (steps // passes) // total
        yield from (torch.where(turn == number)[0].to(device) for number in range(steps // passes))


def _gradients(
    segments: Segments, routing: Routing, target: Tensor, activation: Activation
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each expert's gradients of half the squared error; the expert may be updated before the next is drawn."""
    traced = _Traced(activation)
    batches = list(expert_batches(segments, routing, traced))
    error = -target.to(segments.compute_dtype)
    for batch in batches:
        error.index_add_(0, batch.token, batch.weight * expert_output(segments, batch))
    for expert in range(len(segments.up)):
        gradients = [torch.zeros_like(part[expert]) for part in segments.parts]
        for number, batch in enumerate(batches):
            if batch.expert != expert:
                continue
            pull = batch.weight * error[batch.token]  # (n, o)
            inputs = expert_inputs(segments, routing.inputs(batch.token, batch.slot, error.dtype))
            pulled = traced.pull_back(number, pull @ segments.down[expert].T)  # (n, f) each
            for gradient, by_row in zip(gradients, pulled, strict=False):
                gradient.addmm_(by_row.T, inputs)
            gradients[-1].addmm_(batch.neurons.T, pull)
        yield expert, gradients


class _Traced:
    """An activation that records its calls, to differentiate it with respect to the gate and up pre-activations."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.calls: list[tuple[Tensor, list[Tensor]]] = []

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        before = [part.detach().requires_grad_() for part in (gate, up) if part is not None]
        with torch.enable_grad():
            neurons = self.activation(*(before if gate is not None else (None, *before)))
        self.calls.append((neurons, before))
        return neurons.detach()

    def pull_back(self, call: int, by_neuron: Tensor) -> tuple[Tensor, ...]:
        """Backpropagate from the neurons to the pre-activations (n, f) each, and free the recorded call."""
        neurons, before = self.calls[call]
        self.calls[call] = ()
        return torch.autograd.grad(neurons, before, by_neuron)


def _reduced(
    own: Iterator[tuple[int, list[Tensor]]], max_elements: int, reduce: Reduce
) -> Iterator[tuple[int, list[Tensor]]]:
    """Sum gradients over all processes, batching as many experts per message as memory allows."""
    if reduce is alone:  # a single process sends nothing, so gradients need no batching
        yield from own
        return
    waiting: list[tuple[int, list[Tensor]]] = []
    for item in own:
        waiting.append(item)
        if (len(waiting) + 1) * sum(gradient.numel() for gradient in item[1]) > max_elements:
            yield from _reduced_together(waiting, reduce)
            waiting.clear()
    if waiting:
        yield from _reduced_together(waiting, reduce)


def _reduced_together(waiting: list[tuple[int, list[Tensor]]], reduce: Reduce) -> Iterator[tuple[int, list[Tensor]]]:
    flat = reduce(torch.cat([gradient.flatten() for _, gradients in waiting for gradient in gradients]))
    parts = iter(flat.split([gradient.numel() for _, gradients in waiting for gradient in gradients]))
    for expert, gradients in waiting:
        yield expert, [next(parts).view_as(gradient) for gradient in gradients]


def _move(part: Moving, expert: int, gradient: Tensor, length: float, step: int) -> None:
    """Update one expert's projection by one Adam step."""
    mean, square = part.gradient[expert], part.square[expert]
    mean.lerp_(gradient, 1 - MOMENTUM)
    square.mul_(SMOOTHING).addcmul_(gradient, gradient, value=1 - SMOOTHING)
    scale = square / (1 - SMOOTHING**step)
    damping = DAMPING * scale.mean().sqrt()
    divisor = scale.sqrt_().add_(damping.clamp(min=torch.finfo(scale.dtype).tiny))
    part.value[expert].addcdiv_(mean, divisor, value=-length * part.size / (1 - MOMENTUM**step))


def refit_neurons_cost(shape: LayerShape) -> Cost:
    """Cost of `refit_neurons`: the updated weights, two running means of their gradients, and a minibatch."""
    weights = shape.retained * shape.expert
    tokens = -(-shape.tokens // count_steps(shape.tokens))
    batch = tokens * (shape.top_k * (6 * shape.width + shape.outputs) + shape.inputs + 2 * shape.outputs)
    products = 2 + 1 / shape.projections  # forward, by the projections, and by the neurons
    operations = count_passes(shape.tokens) * products * experts_operations(shape)
    return Cost(shape.number * (batch + 3 * shape.expert), 3 * shape.number * weights, operations)
