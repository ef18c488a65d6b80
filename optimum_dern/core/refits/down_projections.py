"""Closed-form refit of the retained experts' down projections by ridge regression.

With the compressed layer's gate weights g' and neurons h', and y the original layer's routed output, solve

    min  sum_x | y(x) - sum_i g'_i(x) D_i h'_i(x) |^2  +  sum_i lambda_i |D_i - D_i0|^2

expert by expert (block coordinate descent).  With A_i = sum_x g'_i^2 h'_i h'_i^T, lambda_i = ridge * tr(A_i) / f and
r the current residual, one exact step is

    D_i <- D_i + (sum_x g'_i r h'_i^T - lambda_i (D_i - D_i0)) (A_i + lambda_i I)^-1

Experts that few tokens reach stay near their old weights, because the ridge dominates where A_i has low rank.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, Routing, expert_batches, neuron_activations
from ..layer.reduction import Reduce, alone
from ..layer.segments import Segments
from ..layer.slots import slots_by_expert


__all__ = ["refit_down_cost", "refit_down"]

logger = logging.getLogger(__name__)


def refit_down(
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    ridges: Sequence[float],
    sweeps: int = 3,
    reduce: Reduce = alone,
) -> Iterator[Segments]:
    """Refit the down projections of one layer to a target output by ridge regression, with several ridges in turn.

    The neurons and their normal equations are computed once for all ridges and sweeps.

    Args:
        segments: N retained experts; their down projections are the D_i0.
        routing: T tokens as routed in the compressed layer.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons.
        ridges: each relative to the mean eigenvalue of A_i; 0.01 is mild.
        sweeps: passes over the experts.
        reduce: over the processes that share the tokens.

    Yields:
        Per ridge, the segments with new down projections; an expert without tokens, or whose system is singular, keeps
        its own.

    Raises:
        ValueError: a ridge or a number of sweeps that is not positive.
    """
    if sweeps < 1 or not all(ridge > 0 for ridge in ridges):
        raise ValueError(f"refit needs ridge > 0 and sweeps >= 1, got ridge={list(ridges)}, sweeps={sweeps}")
    parts = _part_source(segments, routing, activation)
    grams = _gram_source(parts, segments, reduce)
    if len(ridges) > 1:
        grams = _kept(grams, segments)
    start = target.to(segments.compute_dtype, copy=True)  # (T, o) residual of the unfitted experts
    for expert, down in enumerate(segments.down):
        for part in parts(expert):
            output = part.features @ down.to(start.dtype)  # (n, o)
            bias = 0.0 if segments.output_bias is None else part.weight * segments.output_bias[expert]
            start.index_add_(0, part.token, output + bias, alpha=-1)
    for number, ridge in enumerate(ridges, start=1):
        residual = start if number == len(ridges) else start.clone()
        yield segments._replace(down=_swept(segments, parts, grams, residual, ridge, sweeps, reduce))


class Part(NamedTuple):
    """Some of the tokens that an expert gets, and its neurons times the gate weights."""

    token: Tensor  # (n,)
    features: Tensor  # (n, f)
    weight: Tensor  # (n, 1)


def _swept(
    segments: Segments,
    parts: Callable[[int], Iterable[Part]],
    grams: Callable[[int], Tensor],
    residual: Tensor,
    ridge: float,
    sweeps: int,
    reduce: Reduce,
) -> Tensor:
    """Return the down projections (N, f, o) after some sweeps; the residual (T, o) is updated along with them."""
    original = segments.down
    down = segments.workspace.copy(original, segments.compute_dtype)  # (N, f, o)
    systems = _kept(lambda expert: _invert(grams(expert), ridge), segments) if sweeps > 1 else None
    unsolved = torch.zeros(len(down), dtype=torch.bool, device=down.device)
    for _ in range(sweeps):
        for expert in range(len(down)):
            inverse, penalty, failed = systems(expert) if systems else _invert(grams(expert), ridge)
            correlation = torch.zeros_like(down[expert])  # (f, o)
            for part in parts(expert):
                correlation.addmm_(part.features.T, residual[part.token])
            step = inverse @ (reduce(correlation) - penalty * (down[expert] - original[expert]))
            unsolved[expert] = failed
            down[expert] += step
            for part in parts(expert):
                residual.index_add_(0, part.token, part.features @ step, alpha=-1)
    if experts := [expert for expert, failed in enumerate(unsolved.tolist()) if failed]:
        logger.warning("experts %s: singular refit system, their down projections stay; raise refit_ridge", experts)
    return down


def _invert(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A + lambda I)^-1 (f, f), lambda, and whether it failed; zeros then, and for an expert without tokens."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    penalty = ridge * gram.trace() / len(gram)
    factor, failed = torch.linalg.cholesky_ex(gram + penalty * eye)
    solved = (penalty > 0) & (failed == 0)
    inverse = torch.cholesky_inverse(torch.where(solved, factor, eye)) * solved
    return inverse, penalty, (penalty > 0) & (failed != 0)


def _part_source(segments: Segments, routing: Routing, activation: Activation) -> Callable[[int], Iterable[Part]]:
    """Return a function from expert to its parts, cached if all experts' neurons fit in memory."""

    if routing.index.numel() * segments.down.shape[1] > segments.workspace.max_elements:
        return _computed_parts(segments, routing, activation)
    kept: list[list[Part]] = [[] for _ in segments.down]
    for batch in expert_batches(segments, routing, activation):
        kept[batch.expert].append(Part(batch.token, batch.weight * batch.neurons, batch.weight))
    return kept.__getitem__


def _computed_parts(segments: Segments, routing: Routing, activation: Activation) -> Callable[[int], Iterable[Part]]:
    """Return a function from expert to its parts, computed anew each time from its tokens, which are found once."""
    top_k, dtype = routing.index.shape[1], segments.compute_dtype
    slots = routing.slots or next(slots_by_expert([routing.index], len(segments.down)))

    def compute(expert: int) -> Iterator[Part]:
        for part in slots[expert].split(segments.workspace.chunk_tokens):
            token, slot = part // top_k, part % top_k  # (n,), (n,)
            neurons = neuron_activations(segments, expert, routing.inputs(token, slot, dtype), activation)
            weight = routing.output_weights(token, slot, dtype)
            yield Part(token, weight * neurons, weight)

    return compute


def _gram_source(
    parts: Callable[[int], Iterable[Part]], segments: Segments, reduce: Reduce
) -> Callable[[int], Tensor]:
    """Return a function from expert to its matrix A (f, f)."""
    width = segments.down.shape[1]

    def compute(expert: int) -> Tensor:
        gram = segments.down.new_zeros(width, width, dtype=segments.compute_dtype)
        for part in parts(expert):
            gram.addmm_(part.features.T, part.features)
        return reduce(gram)

    return compute


def _kept(compute: Callable[[int], Any], segments: Segments) -> Callable[[int], Any]:
    """Return the function with its results for all experts cached if matrices (N, f, f) fit in memory."""
    experts, width, _ = segments.down.shape
    if experts * width**2 > segments.workspace.max_elements:
        return compute
    return [compute(expert) for expert in range(experts)].__getitem__


def refit_down_cost(shape: LayerShape, sweeps: int, ridges: int = 1) -> Cost:
    """Cost of `refit_down` on the tokens of a shape, without copies of their inputs and targets."""
    neurons, matrices = shape.tokens * shape.top_k * shape.width, shape.retained * shape.width**2
    kept, cached = neurons <= shape.max_elements, matrices <= shape.max_elements
    rounds = sweeps * ridges
    held = (1 + (ridges > 1)) * shape.tokens * shape.outputs + 4 * shape.width**2 + 3 * shape.down
    held += (neurons if kept else 0) + (matrices * ((ridges > 1) + (sweeps > 1)) if cached else 0)
    down = shape.retained * shape.down
    routed = 2.0 * shape.tokens * shape.top_k * shape.down
    grams = 1 if cached else rounds
    once = experts_operations(shape) + 2.0 * neurons * shape.width * grams + 2 * rounds * routed
    again = 0 if kept else (2 * rounds + grams) * (experts_operations(shape) - routed)
    inverted = (ridges if cached else rounds) * shape.retained * shape.width**3
    solved = rounds * shape.retained * 2.0 * shape.width * shape.down + inverted
    return Cost(
        shape.number * held + held_by_chunk(shape), (1 + (ridges > 1)) * shape.number * down, once + again + solved
    )
