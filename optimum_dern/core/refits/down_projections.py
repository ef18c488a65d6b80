"""Closed-form refit of the retained experts' down projections by ridge regression.

With the compressed layer's gate weights g' and neurons h', and y the original layer's routed output, solve

    min  sum_x | y(x) - sum_i g'_i(x) D_i h'_i(x) |^2  +  sum_i lambda_i |D_i - D_i0|^2

expert by expert (block coordinate descent).  With A_i = sum_x g'_i^2 h'_i h'_i^T, lambda_i = ridge * tr(A_i) / f and
r the current residual, one exact step is

    D_i <- D_i + (sum_x g'_i r h'_i^T - lambda_i (D_i - D_i0)) (A_i + lambda_i I)^-1

Experts that few tokens reach stay near their old weights, because the ridge dominates where A_i has low rank.
"""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, ExpertBatch, Routing, expert_batches, expert_output
from ..layer.reduction import Reduce, alone, any_process
from ..layer.segments import Segments


__all__ = ["refit_down_cost", "refit_down"]

logger = logging.getLogger(__name__)


def refit_down(
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    ridge: float,
    sweeps: int = 3,
    start: Tensor | None = None,
    reduce: Reduce = alone,
) -> Segments:
    """Refit the down projections of one layer to a target output by ridge regression.

    Args:
        segments: N retained experts; their down projections are the D_i0.
        routing: T tokens as routed in the compressed layer.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons.
        ridge: relative to the mean eigenvalue of A_i; 0.01 is mild.
        sweeps: passes over the experts.
        start: (N, f, o) down projections to start from; by default the D_i0.
        reduce: over the processes that share the tokens.

    Returns:
        Segments with new down projections; an expert without tokens, or whose system is singular, keeps its own.

    Raises:
        ValueError: a ridge or a number of sweeps that is not positive.
    """
    if not ridge > 0 or sweeps < 1:
        raise ValueError(f"refit needs ridge > 0 and sweeps >= 1, got ridge={ridge}, sweeps={sweeps}")
    original = segments.down
    down = segments.workspace.copy(original if start is None else start, segments.compute_dtype)  # (N, f, o)
    batches = _batch_source(segments, routing, activation)
    residual = target.to(down.dtype, copy=True)  # (T, o)
    for expert in range(len(down)):
        for batch in batches(expert):
            residual[batch.token] -= batch.weight * expert_output(segments._replace(down=down), batch)
    factors = _factor_source(batches, down, ridge, reduce, segments.workspace.max_elements)
    for _ in range(sweeps):
        for expert in range(len(down)):
            factorised = factors(expert)
            if factorised is None:
                continue
            factor, penalty = factorised
            correlation = torch.zeros_like(down[expert])  # (f, o)
            for batch in batches(expert):
                correlation += (batch.weight * batch.neurons).T @ residual[batch.token]
            correlation = reduce(correlation)
            step = torch.cholesky_solve(correlation - penalty * (down[expert] - original[expert]), factor)
            down[expert] += step
            for batch in batches(expert):
                residual[batch.token] -= (batch.weight * batch.neurons) @ step
    return segments._replace(down=down)


def _batch_source(
    segments: Segments, routing: Routing, activation: Activation
) -> Callable[[int], Iterable[ExpertBatch]]:
    """Return a function from expert to its batches, cached if all experts' activations fit in memory."""

    def compute(expert: int) -> Iterable[ExpertBatch]:
        return expert_batches(segments, routing, activation, [expert])

    if routing.index.numel() * segments.down.shape[1] > segments.workspace.max_elements:
        return compute
    kept = [list(compute(expert)) for expert in range(len(segments.down))]
    return kept.__getitem__


def _factor_source(
    batches: Callable[[int], Iterable[ExpertBatch]], down: Tensor, ridge: float, reduce: Reduce, max_elements: int
) -> Callable[[int], tuple[Tensor, Tensor] | None]:
    """Return a function from expert to its Cholesky factor, cached if all experts' factors fit in memory."""

    def compute(expert: int) -> tuple[Tensor, Tensor] | None:
        return _factorise(batches(expert), down[expert], expert, ridge, reduce)

    if down.shape[0] * down.shape[1] ** 2 > max_elements:
        return compute
    return [compute(expert) for expert in range(len(down))].__getitem__


def _factorise(
    batches: Iterable[ExpertBatch], down: Tensor, expert: int, ridge: float, reduce: Reduce
) -> tuple[Tensor, Tensor] | None:
    """Compute the Cholesky factor of A + lambda I, and lambda; None if A is zero or the system singular."""
    width = len(down)
    gram = down.new_zeros(width, width)  # (f, f)
    for batch in batches:
        features = batch.weight * batch.neurons  # (n, f)
        gram += features.T @ features
    gram = reduce(gram)
    penalty = ridge * gram.trace() / width
    if not penalty > 0:
        return None
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if any_process(failed, reduce):
        logger.warning("expert %d: singular refit system, its down projection stays; raise refit_ridge", expert)
        return None
    return factor, penalty


def refit_down_cost(shape: LayerShape, sweeps: int) -> Cost:
    """Cost of `refit_down` on the tokens of a shape, without copies of their inputs and targets."""
    neurons, factors = shape.tokens * shape.top_k * shape.width, shape.retained * shape.width**2
    kept = neurons <= shape.max_elements
    held = shape.tokens * shape.outputs + 2 * shape.width**2 + 3 * shape.down + (neurons if kept else 0)
    held += factors if factors <= shape.max_elements else 0
    down = shape.retained * shape.down
    routed = 2.0 * shape.tokens * shape.top_k * shape.down
    gram = 2.0 * neurons * shape.width + shape.retained * shape.width**3 / 3
    once = experts_operations(shape) + gram + 2 * sweeps * routed
    again = 0 if kept else (2 * sweeps + 1) * (experts_operations(shape) - routed)
    solved = sweeps * 2.0 * shape.retained * shape.width * shape.down
    return Cost(shape.number * held + held_by_chunk(shape), shape.number * down, once + again + solved)
