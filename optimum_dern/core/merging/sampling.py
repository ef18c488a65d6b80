"""The tokens that experts are compared on: evenly spaced, and the same however processes share them."""

import torch
from torch import Tensor

from ..layer.observation import ObservedLayer
from ..layer.reduction import largest


__all__ = ["sampled"]


def sampled(layer: ObservedLayer, limit: int) -> Tensor:
    """Mark evenly spaced calibration tokens that are not held out.

    Args:
        layer: observed on T tokens.
        limit: most tokens of all processes together.

    Returns:
        (T,) bool.
    """
    fitted = ~layer.held_out
    step = max(1, -(-int(layer.reduce(fitted.sum())) // limit))
    return fitted if step == 1 else fitted & (_turns(layer, fitted) % step == 0)


def _turns(layer: ObservedLayer, fitted: Tensor) -> Tensor:
    """Return the rank (T,) of each token among the tokens of all processes that are not held out."""
    order = torch.arange(len(fitted)) if layer.order is None else layer.order
    order = order.to(fitted.device)
    every = torch.zeros(int(largest(order + 1, layer.reduce)), dtype=torch.int64, device=fitted.device)
    every[order[fitted]] = 1
    every = layer.reduce(every)
    return (every.cumsum(0) - every)[order]
