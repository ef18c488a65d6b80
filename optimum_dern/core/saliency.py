"""How much an expert matters: one small function per published criterion, from statistics to (E,) scores.

Larger is more important.  g is the weight that the model itself applies, e(x) the expert's output before it, X_i the
tokens routed to expert i, T all tokens.  An expert that no token reached scores 0 everywhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .statistics import ExpertStatistics


__all__ = ["CRITERIA", "check_criterion", "score_experts"]


def router(statistics: ExpertStatistics) -> Tensor:
    """Mean routing weight over all tokens, sum g / T (DERN, arXiv 2509.10377, step 1)."""
    return statistics.weight / max(statistics.tokens, 1)


def frequency(statistics: ExpertStatistics) -> Tensor:
    """Share of the tokens that reach the expert, |X_i| / T."""
    return statistics.count / max(statistics.tokens, 1)


def ean(statistics: ExpertStatistics) -> Tensor:
    """Expert activation norm, sum over X_i of |e| (the sum form of the REAP repository's `ean_sum`)."""
    return statistics.output_norm.clone()


def reap(statistics: ExpertStatistics) -> Tensor:
    """Router-weighted expert activation, mean over X_i of g |e| (REAP, arXiv 2510.13999)."""
    return _per_routed_token(statistics.weighted_output_norm, statistics)


def man(statistics: ExpertStatistics) -> Tensor:
    """Mean activation norm, mean over X_i of |e| (MAN, arXiv 2606.15716)."""
    return _per_routed_token(statistics.output_norm, statistics)


def msan(statistics: ExpertStatistics) -> Tensor:
    """Mean squared activation norm, mean over X_i of |e|^2 (MSAN, arXiv 2606.15716)."""
    return _per_routed_token(statistics.output_norm_squared, statistics)


CRITERIA: dict[str, Callable[[ExpertStatistics], Tensor]] = {
    function.__name__: function for function in (router, frequency, ean, reap, man, msan)
}


def score_experts(criterion: str, statistics: ExpertStatistics, seed: int = 0) -> Tensor:
    """Score the experts of one layer.

    Args:
        criterion: a key of `CRITERIA`, or `"random"`, the control that every comparison needs.
        statistics: the layer's sums.
        seed: for `"random"` only.

    Returns:
        (E,) float64, larger is more important.

    Raises:
        ValueError: unknown criterion.
    """
    check_criterion(criterion)
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(statistics.count), generator=generator, dtype=torch.float64)
    return CRITERIA[criterion](statistics)


def check_criterion(criterion: str) -> None:
    """Raise ValueError for a criterion that `score_experts` does not know."""
    if criterion not in CRITERIA and criterion != "random":
        raise ValueError(f"unknown selection criterion {criterion!r}; choose one of {sorted([*CRITERIA, 'random'])}")


def _per_routed_token(total: Tensor, statistics: ExpertStatistics) -> Tensor:
    return total / statistics.count.clamp(min=1)
