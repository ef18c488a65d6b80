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

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import Activation, ExpertBatch, Routing, expert_batches, expert_output
from ..layer.reduction import Reduce, alone
from ..layer.segments import Segments


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
    batches = _batch_source(segments, routing, activation)
    grams = _gram_source(batches, segments, reduce)
    start = target.to(segments.compute_dtype, copy=True)  # (T, o) residual of the unfitted experts
    for expert in range(len(segments.down)):
        for batch in batches(expert):
            start[batch.token] -= batch.weight * expert_output(segments, batch)
    for number, ridge in enumerate(ridges, start=1):
        residual = start if number == len(ridges) else start.clone()
        yield segments._replace(down=_swept(segments, batches, grams, residual, ridge, sweeps, reduce))


def _swept(
    segments: Segments,
    batches: Callable[[int], Iterable[ExpertBatch]],
    grams: Callable[[int], Tensor],
    residual: Tensor,
    ridge: float,
    sweeps: int,
    reduce: Reduce,
) -> Tensor:
    """Return the down projections (N, f, o) after some sweeps; the residual (T, o) is updated along with them."""
    original, width = segments.down, segments.down.shape[1]
    down = segments.workspace.copy(original, segments.compute_dtype)  # (N, f, o)
    unsolved = torch.zeros(len(down), dtype=torch.bool, device=down.device)
    for _ in range(sweeps):
        for expert in range(len(down)):
            gram = grams(expert)
            penalty = ridge * gram.trace() / width
            factor, failed = torch.linalg.cholesky_ex(gram + penalty * torch.eye(width).to(gram))
            correlation = torch.zeros_like(down[expert])  # (f, o)
            for batch in batches(expert):
                correlation.addmm_((batch.weight * batch.neurons).T, residual[batch.token])
            correlation = reduce(correlation)
            step = torch.cholesky_solve(correlation - penalty * (down[expert] - original[expert]), factor)
            unsolved[expert] = (penalty > 0) & (failed != 0)
            step = torch.where((penalty > 0) & (failed == 0), step, 0.0)  # nothing for an expert without tokens
            down[expert] += step
            for batch in batches(expert):
                residual.index_add_(0, batch.token, (batch.weight * batch.neurons) @ step, alpha=-1)
    if experts := unsolved.nonzero().flatten().tolist():
        logger.warning("experts %s: singular refit system, their down projections stay; raise refit_ridge", experts)
    return down


def _batch_source(
    segments: Segments, routing: Routing, activation: Activation
) -> Callable[[int], Iterable[ExpertBatch]]:
    """Return a function from expert to its batches, cached if all experts' activations fit in memory."""

    def compute(expert: int) -> Iterable[ExpertBatch]:
        return expert_batches(segments, routing, activation, [expert])

    if routing.index.numel() * segments.down.shape[1] > segments.workspace.max_elements:
        return compute
    kept: list[list[ExpertBatch]] = [[] for _ in segments.down]
    for batch in expert_batches(segments, routing, activation):
        kept[batch.expert].append(batch)
    return kept.__getitem__


def _gram_source(
    batches: Callable[[int], Iterable[ExpertBatch]], segments: Segments, reduce: Reduce
) -> Callable[[int], Tensor]:
    """Return a function from expert to its matrix A (f, f), cached if those of all experts fit in memory."""
    experts, width, _ = segments.down.shape

    def compute(expert: int) -> Tensor:
        gram = segments.down.new_zeros(width, width, dtype=segments.compute_dtype)
        for batch in batches(expert):
            features = batch.weight * batch.neurons  # (n, f)
            gram.addmm_(features.T, features)
        return reduce(gram)

    if experts * width**2 > segments.workspace.max_elements:
        return compute
    return [compute(expert) for expert in range(experts)].__getitem__


def refit_down_cost(shape: LayerShape, sweeps: int, ridges: int = 1) -> Cost:
    """Cost of `refit_down` on the tokens of a shape, without copies of their inputs and targets."""
    neurons, grams = shape.tokens * shape.top_k * shape.width, shape.retained * shape.width**2
    kept, rounds = neurons <= shape.max_elements, sweeps * ridges
    held = (1 + (ridges > 1)) * shape.tokens * shape.outputs + 3 * shape.width**2 + 3 * shape.down
    held += (neurons if kept else 0) + (grams if grams <= shape.max_elements else 0)
    down = shape.retained * shape.down
    routed = 2.0 * shape.tokens * shape.top_k * shape.down
    once = experts_operations(shape) + 2.0 * neurons * shape.width + 2 * rounds * routed
    again = 0 if kept else (2 * rounds + 1) * (experts_operations(shape) - routed)
    solved = rounds * shape.retained * (2.0 * shape.width * shape.down + shape.width**3 / 3)
    return Cost(
        shape.number * held + held_by_chunk(shape), (1 + (ridges > 1)) * shape.number * down, once + again + solved
    )
