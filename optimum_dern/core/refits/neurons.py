"""Refit of the retained experts' gate, up and down projections by minibatch gradient descent.

Tokens of dropped experts are now routed to experts that were not trained on them.  With the routing fixed, all three
projections of all retained experts are updated together along the gradient of

    sum_x | y(x) - sum_i g_i D_i h_i(x) |^2,        h_i(x) = act(G_i x) * (U_i x)

over minibatches of calibration tokens.  With r the residual, a and b the derivatives of the activation by the gate and
up pre-activations, and p_i = g_i D_i^T r,

    dG_i = - (a_i * p_i) x^T        dU_i = - (b_i * p_i) x^T        dD_i = - r (g_i h_i)^T

are written out, so that autograd is needed for the activation only and an expert's gradient is freed once the expert
is updated.  A gradient is divided by the root of its running mean square, which is kept as the mean of every row and
of every column (Adafactor, arXiv 1804.04235), and the result goes through momentum.  Steps have one length throughout,
relative to the size of the weights; the weights handed out are the running mean over the last passes' steps (Polyak
averaging), which at any time is as good as a descent that has slowed down: so it can be ended after any pass.
Steps do not depend on the scale of the outputs, so huge ones are divided by a power of two, which changes no digit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations
from ..layer.mixture import Activation, Routing, expert_batches, expert_inputs, expert_output
from ..layer.reduction import Reduce, alone
from ..layer.segments import Segments
from ..layer.slots import slots_by_expert
from ..layer.traced import TracedActivation


__all__ = ["count_passes", "count_steps", "descend_neurons", "descend_neurons_cost"]

MOST_PASSES, FEWEST_PASSES = 10, 2  # over the tokens
ENOUGH_TOKENS = 1_500_000  # in all passes together: with more tokens, fewer passes are enough
BATCH_TOKENS = 1024
STEPS_PER_PASS = 32  # at least; batches are smaller if tokens are few
SMALLEST_BATCH = 64
ENOUGH_PER_EXPERT = 128  # tokens of a batch that an expert gets: with fewer, updating takes longer than the gradient
RATE = 0.06  # length of a step, relative to the root mean square of the weights
MOMENTUM, SMOOTHING = 0.8, 0.95  # decay of the running means of the steps and of the squared gradient
DAMPING = 0.1  # limits the step of weights whose gradient is small compared with their expert's
HUGE = 1 << 16  # outputs above it are scaled down: their gradients' squares may be beyond float32
AVERAGED_PASSES = 1.5  # over which the weights are averaged


class Moving(NamedTuple):
    """A projection being optimised, with the state of the optimiser."""

    value: Tensor  # (N, f, d) or (N, f, o)
    step: Tensor  # running mean of the steps, of the same shape
    average: Tensor  # running mean of the value
    rows: Tensor  # (N, f, 1) running mean of the squared gradient, averaged over each row
    columns: Tensor  # (N, 1, d) or (N, 1, o), likewise over each column
    size: Tensor  # () root mean square of the projection at the start


def count_passes(tokens: int) -> int:
    """Return the largest useful number of passes over this many tokens."""
    return max(FEWEST_PASSES, min(MOST_PASSES, ENOUGH_TOKENS // max(tokens, 1)))


def count_steps(tokens: int, experts_per_choice: int = 1) -> int:
    """Return the number of minibatches in a pass.

    Args:
        tokens: over all processes.
        experts_per_choice: number of experts divided by the number that a token is routed to.
    """
    smallest = max(SMALLEST_BATCH, ENOUGH_PER_EXPERT * experts_per_choice)
    return max(1, tokens // max(BATCH_TOKENS, smallest), min(STEPS_PER_PASS, tokens // smallest))


def descend_neurons(
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    rate: float = RATE,
    order: Tensor | None = None,
    reduce: Reduce = alone,
    seed: int = 0,
) -> Iterator[Segments]:
    """Refit gate, up and down projections to a target output by minibatch gradient descent, pass after pass.

    Args:
        segments: N experts.
        routing: T tokens.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons, elementwise in the neurons.
        rate: length of the steps, relative to the size of the weights.
        order: (T,) distinct numbers of the tokens, among those of all processes; by default 0 to T - 1.
        reduce: over the processes that share the tokens.
        seed: of the minibatches, which do not depend on the distribution of tokens over processes.

    Yields:
        The segments with new projections after every pass over the tokens, without end; the next pass writes into
        the same tensors.
    """
    order = torch.arange(len(target)) if order is None else order.cpu()
    asked = order.device if reduce is alone else target.device  # only other processes need the numbers on a GPU
    total = int(reduce(torch.tensor(len(target), device=asked)))
    steps = count_steps(total, len(segments.up) // routing.index.shape[1])
    highest, peak = _ends(order, target, reduce)
    scale = torch.where(peak > HUGE, peak.log2().floor().exp2(), torch.ones_like(peak))
    *others, down = segments.parts
    moving = [*(_moving(part, segments) for part in others), _moving(down, segments, scale)]
    bias = segments.output_bias
    scaled = segments if bias is None else segments._replace(output_bias=bias / scale)
    step, generator = 0, torch.Generator().manual_seed(seed)
    while True:
        for tokens, routed in _minibatches(order, highest + 1, steps, routing, len(segments.up), generator):
            step += 1
            kept = max(1 / step, 1 / (AVERAGED_PASSES * steps))
            current = _with_parts(scaled, [part.value for part in moving])
            own = _gradients(current, routed, target[tokens] / scale, activation)
            for expert, gradients in _reduced(own, segments.workspace.max_elements, reduce):
                for part, gradient in zip(moving, gradients, strict=True):
                    _move(part, expert, gradient, rate, step)
                    part.average[expert].lerp_(part.value[expert], kept)
        moving[-1].average.mul_(scale)
        yield _with_parts(segments, [part.average for part in moving])
        moving[-1].average.div_(scale)


def _ends(order: Tensor, target: Tensor, reduce: Reduce) -> tuple[int, Tensor]:
    """Return the highest number of a token and the largest output () over all processes, by one message."""
    number = order.max() if len(order) else order.new_zeros(())
    peak = torch.stack(target.aminmax()).abs().max() if target.numel() else target.new_zeros(())
    if reduce is alone:
        return int(number), peak
    both = reduce(torch.stack([number.to(target.device).double(), peak.double()]), "max")
    return int(both[0]), both[1].to(peak.dtype)


def _moving(part: Tensor, segments: Segments, scale: Tensor | float = 1.0) -> Moving:
    space = segments.workspace
    value, average = (space.copy(part, segments.compute_dtype).div_(scale) for _ in range(2))
    step = space.empty_like(value).zero_()
    rows, columns = value.new_zeros(*value.shape[:2], 1), value.new_zeros(len(value), 1, value.shape[2])
    size = (torch.stack([expert.square().sum() for expert in value]).sum() / value.numel()).sqrt()
    return Moving(value, step, average, rows, columns, size)


def _with_parts(segments: Segments, parts: list[Tensor]) -> Segments:
    *gate, up, down = parts
    return segments._replace(gate=gate[0] if gate else None, up=up, down=down)


def _minibatches(
    order: Tensor, total: int, steps: int, routing: Routing, num_experts: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Routing]]:
    """Yield this process's tokens (n,) of each minibatch of a pass, together all of its tokens, and their routing."""
    turn = torch.randperm(total, generator=generator)[order] * steps // total  # (T,) number of the minibatch
    tokens = turn.argsort(stable=True).to(routing.index.device).split(turn.bincount(minlength=steps).tolist())
    slots = slots_by_expert([routing.index[part] for part in tokens], num_experts)  # the host waits once in a pass
    for part, own in zip(tokens, slots, strict=True):
        yield part, routing.select(part)._replace(slots=own)


def _gradients(
    segments: Segments, routing: Routing, target: Tensor, activation: Activation
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each expert's gradients of half the squared error; the expert may be updated before the next is drawn."""
    traced = TracedActivation(activation)
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


def _move(part: Moving, expert: int, gradient: Tensor, rate: float, number: int) -> None:
    """Update one expert's projection by one step, the `number`-th."""
    rows, columns, step = part.rows[expert], part.columns[expert], part.step[expert]
    squared = gradient.square()
    kept = (1 - SMOOTHING) / (1 - SMOOTHING**number)
    rows.lerp_(squared.mean(1, keepdim=True), kept)
    columns.lerp_(squared.mean(0, keepdim=True), kept)
    mean = rows.mean().clamp(min=torch.finfo(rows.dtype).tiny)
    gradient.div_((rows / mean).sqrt().add_(DAMPING)).div_(columns.sqrt().add_(DAMPING * mean.sqrt()))
    step.lerp_(gradient, 1 - MOMENTUM)  # starts at zero, so that the first steps are short
    part.value[expert].sub_(rate * part.size * step)


def descend_neurons_cost(shape: LayerShape) -> Cost:
    """Cost of all useful passes of `descend_neurons`: weights, running means of them and their steps, a minibatch."""
    weights = shape.retained * shape.expert
    tokens = -(-shape.tokens // count_steps(shape.tokens, shape.retained // shape.top_k))
    slots = 8 * shape.tokens * shape.top_k  # the indices of all minibatches
    batch = tokens * (shape.top_k * (6 * shape.width + shape.outputs) + shape.inputs + 2 * shape.outputs)
    products = 2 + 1 / shape.projections  # forward, by the projections, and by the neurons
    operations = count_passes(shape.tokens) * products * experts_operations(shape)
    return Cost(slots + shape.number * (batch + 3 * shape.expert), 3 * shape.number * weights, operations)
