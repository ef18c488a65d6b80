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
from typing import NamedTuple

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
    """Refit the down projections of one layer to a target output by ridge regression, with several ridges at once.

    Every expert's neurons are computed three times for all ridges of one sweep, or once where they fit in memory.

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
    for down in _fitted(segments, _part_source(segments, routing, activation), target, ridges, sweeps, reduce):
        yield segments._replace(down=down)


class Part(NamedTuple):
    """Some of the tokens that an expert gets, and its neurons times the gate weights."""

    token: Tensor  # (n,)
    features: Tensor  # (n, f)
    weight: Tensor  # (n, 1)


class Fit(NamedTuple):
    """The fit with one ridge so far."""

    ridge: float
    down: Tensor  # (N, f, o)
    residual: Tensor  # (T, o) target less the output


def _fitted(
    segments: Segments,
    parts: Callable[[int], Iterable[Part]],
    target: Tensor,
    ridges: Sequence[float],
    sweeps: int,
    reduce: Reduce,
) -> list[Tensor]:
    """Return the down projections (N, f, o) for each ridge; their residuals are freed."""
    start, space, experts = _residual(segments, parts, target), segments.workspace, len(segments.down)
    residuals = [start, *(start.clone() for _ in ridges[1:])]
    downs = [space.copy(segments.down, start.dtype) for _ in ridges]
    fits = list(map(Fit, ridges, downs, residuals))
    failed = torch.zeros(len(ridges), experts, dtype=torch.bool, device=start.device)
    kept: dict[int, Tensor] = {}  # matrices A by expert, for the next sweep
    keep = sweeps > 1 and experts * segments.down.shape[1] ** 2 <= space.max_elements
    for _ in range(sweeps):
        for expert in range(experts):
            gram, correlations = _normal_equations(parts(expert), fits, expert, kept.get(expert), reduce)
            if keep:
                kept[expert] = gram
            failed[:, expert] = _step_(segments, parts(expert), fits, expert, gram, correlations)
    for fit, flags in zip(fits, failed.tolist(), strict=True):
        if unsolved := [expert for expert, flag in enumerate(flags) if flag]:
            reason = "singular refit system, their down projections stay; raise refit_ridge"
            logger.warning("experts %s: %s (ridge %g)", unsolved, reason, fit.ridge)
    return downs


def _residual(segments: Segments, parts: Callable[[int], Iterable[Part]], target: Tensor) -> Tensor:
    """Compute the target (T, o) less the output of the unfitted experts."""
    residual = target.to(segments.compute_dtype, copy=True)
    for expert, down in enumerate(segments.down):
        for part in parts(expert):
            output = part.features @ down.to(residual.dtype)  # (n, o)
            bias = 0.0 if segments.output_bias is None else part.weight * segments.output_bias[expert]
            residual.index_add_(0, part.token, output + bias, alpha=-1)
    return residual


def _normal_equations(
    parts: Iterable[Part], fits: Sequence[Fit], expert: int, gram: Tensor | None, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """Compute an expert's matrix A (f, f), unless it is given, and its products with the residuals (ridges, f, o)."""
    down, known = fits[0].down[expert], gram is not None
    gram = gram if known else down.new_zeros(len(down), len(down))
    correlations = down.new_zeros(len(fits), *down.shape)
    for part in parts:
        if not known:
            gram.addmm_(part.features.T, part.features)
        for correlation, fit in zip(correlations, fits, strict=True):
            correlation.addmm_(part.features.T, fit.residual[part.token])
    return gram if known else reduce(gram), reduce(correlations)


def _step_(
    segments: Segments,
    parts: Iterable[Part],
    fits: Sequence[Fit],
    expert: int,
    gram: Tensor,
    correlations: Tensor,
) -> Tensor:
    """Take the exact step of one expert with every ridge; returns which of them (ridges,) failed."""
    steps, failures = [], []
    for fit, correlation in zip(fits, correlations, strict=True):
        inverse, penalty, failed = _invert(gram, fit.ridge)
        steps.append(inverse @ (correlation - penalty * (fit.down[expert] - segments.down[expert])))
        fit.down[expert] += steps[-1]
        failures.append(failed)
    for part in parts:
        for fit, step in zip(fits, steps, strict=True):
            fit.residual.index_add_(0, part.token, part.features @ step, alpha=-1)
    return torch.stack(failures)


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


def refit_down_cost(shape: LayerShape, sweeps: int, ridges: int = 1) -> Cost:
    """Cost of `refit_down` on the tokens of a shape, without copies of their inputs and targets."""
    neurons, matrices = shape.tokens * shape.top_k * shape.width, shape.retained * shape.width**2
    kept, cached = neurons <= shape.max_elements, sweeps > 1 and matrices <= shape.max_elements
    rounds = sweeps * ridges
    held = ridges * shape.tokens * shape.outputs + 4 * shape.width**2 + (2 * ridges + 1) * shape.down
    held += (neurons if kept else 0) + (matrices if cached else 0)
    down = shape.retained * shape.down
    routed = 2.0 * shape.tokens * shape.top_k * shape.down
    grams = 1 if cached else sweeps
    once = experts_operations(shape) + 2.0 * neurons * shape.width * grams + 2 * rounds * routed
    again = 0 if kept else 2 * sweeps * (experts_operations(shape) - routed)
    solved = rounds * shape.retained * (2.0 * shape.width * shape.down + shape.width**3)
    return Cost(shape.number * held + held_by_chunk(shape), ridges * shape.number * down, once + again + solved)
