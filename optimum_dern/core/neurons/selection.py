"""Choose the neurons that every expert keeps: the same number of each, or the best of several experts together."""

import math

import torch
from torch import Tensor

from ..layer.segments import Segments


__all__ = ["PADDING", "check_scores", "narrow", "retained_width", "select_neurons", "select_together"]

PADDING = -1  # in the place of a neuron: zero weights


def retained_width(width: int, sparsity: float, multiple_of: int = 1) -> int:
    """Compute how many neurons an expert keeps: a fraction of them, rounded up to a multiple.

    Args:
        width: f, neurons of an expert.
        sparsity: fraction of the neurons dropped.
        multiple_of: of which the result is a multiple, but never above `width`.
    """
    kept = max(1, math.ceil(width * (1 - sparsity) - 1e-9))
    return min(width, -(-kept // multiple_of) * multiple_of)


def check_scores(scores: Tensor) -> None:
    """Raise ValueError for scores of neurons that are not finite."""
    if not torch.isfinite(scores).all():
        raise ValueError("neuron scores contain NaN or infinity; check the calibration data and the model's weights")


def select_neurons(scores: Tensor, width: int, protected: Tensor | None = None) -> Tensor:
    """Select the neurons of largest score in every expert (of ties the first).

    Args:
        scores: (E, f), larger is more important.
        width: number of neurons that every expert keeps.
        protected: (E, f) bool, neurons that are kept whatever their score; the largest, if they are too many.

    Returns:
        (E, width) indices, ascending: the neurons keep their order.

    Raises:
        ValueError: scores that are not finite.
    """
    return _ranked(scores, protected)[:, :width].sort(dim=1).values


def select_together(scores: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """Select the neurons of largest score of all experts together (of ties the first): each keeps its own number.

    Args:
        scores: (E, f), larger is more important, comparable between the experts.
        count: number of neurons that all experts together keep.
        protected: (E, f) bool, neurons that are kept whatever their score; the largest, if they are too many.

    Returns:
        (E, f) indices, ascending, then `PADDING` in every row.

    Raises:
        ValueError: scores that are not finite.
    """
    ranked = _ranked(scores.reshape(1, -1), None if protected is None else protected.reshape(1, -1))
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[ranked[0, :count]] = True
    kept = kept.view(scores.shape)
    order = kept.int().argsort(dim=1, descending=True, stable=True)  # (E, f) kept ones first, in their order
    return torch.where(kept.gather(1, order), order, PADDING)


def _ranked(scores: Tensor, protected: Tensor | None) -> Tensor:
    """Order the neurons of each row by score, protected ones first: indices of the shape of the scores."""
    check_scores(scores)
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    if protected is None:
        return ranked
    first = protected.gather(1, ranked).int().argsort(dim=1, descending=True, stable=True)
    return ranked.gather(1, first)


def narrow(segments: Segments, neurons: Tensor) -> Segments:
    """Select neurons of every expert: copies, one expert at a time.

    Args:
        segments: N experts of f neurons.
        neurons: (N, width) indices of the retained neurons; `PADDING` makes one of zero weights, which does nothing.
    """

    def chosen(part: Tensor) -> Tensor:
        made = segments.workspace.empty_like(part[:, : neurons.shape[1]])
        for kept, own, index in zip(made, part, neurons.to(part.device), strict=True):
            kept.copy_(own[index])  # of padding the last neuron, which is zeroed next
            kept.masked_fill_((index == PADDING).unsqueeze(1), 0)
        return made

    parts = {name: chosen(getattr(segments, name)) for name in ("up", "down")}
    gate = None if segments.gate is None else chosen(segments.gate)
    return segments._replace(gate=gate, **parts)
