"""Conjugate gradients for symmetric positive definite operators."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..layer.reduction import Reduce, alone, any_process


__all__ = ["conjugate_gradients"]


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    iterations: int,
    tolerance: float,
    reduce: Reduce = alone,
) -> Tensor:
    """Solve operator(x) = right by conjugate gradients.

    Args:
        operator: symmetric, positive definite, on tensors of any shape.
        right: right-hand side.
        iterations: at most this many.
        tolerance: stop once |residual| <= tolerance * |right|.
        reduce: over the processes, if the operator is reduced over them; all hold the whole x and stop together.

    Returns:
        x, of the shape of `right`.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction, energy = residual.clone(), residual.square().sum()
    goal = energy * tolerance**2
    for _ in range(iterations):
        if not any_process(~(energy <= goal), reduce):
            break
        image = operator(direction)
        length = energy / (direction * image).sum()
        solution += length * direction
        residual -= length * image
        energy, before = residual.square().sum(), energy
        direction = residual + (energy / before) * direction
    return solution
