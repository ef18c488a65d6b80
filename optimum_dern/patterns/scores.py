"""Task-conditioned expected selection scores (TCESS) of a layer's experts (PreMoe, arXiv 2505.17639)."""

import torch
from torch import Tensor


__all__ = ["selection_scores"]


def selection_scores(logits: Tensor, top: int = 1, confidence: float | None = None) -> Tensor:
    """Sum the router logits of the experts that tokens would choose first.

    Args:
        logits: (T, E) of the router, raw.
        top: experts per token whose logits count (the paper's K_a).
        confidence: a token counts only if its largest probability, by softmax, is at least this; None for all.

    Returns:
        (E,) float64 sums over the tokens; the score is their mean.
    """
    values, index = logits.topk(top, dim=1)  # (T, top)
    if confidence is not None:
        sure = logits.softmax(1).amax(1, keepdim=True) >= confidence
        values = torch.where(sure, values, 0.0)
    total = logits.new_zeros(logits.shape[1], dtype=torch.float64)
    return total.index_add_(0, index.flatten(), values.flatten().double())
