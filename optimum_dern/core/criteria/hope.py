"""HOPE: select experts to prune by their joint contribution, including co-activation (arXiv 2609.18916).

Pruning two experts that are active on the same tokens costs more than the sum of pruning each.  Let a_i be g_i |e_i|
on a token, F_ij the mean of a_i a_j over the tokens that chose both (0 where none did), and F_kk that of a_k^2 over
the tokens of k.  The pruned set p in {0, 1}^E minimises

    p^T F p,    sum of p = E - N

relaxed to [0, 1]^E, solved by sequential quadratic programming, rounded, and improved by exchanging one pruned expert
for one retained expert as long as that helps; the same exchanges from the experts of the least F_kk, and the better of
the two.  Where there are few sets, all are tried.  Groups of a group-limited router each prune the same number.
"""

import numpy as np
import torch
from torch import Tensor

from ..layer.statistics import ExpertStatistics
from .selection import MAX_SETS, Places, all_sets, check_places, count_sets, select_experts


__all__ = ["hope", "interaction"]

ITERATIONS = 200  # of the quadratic programming; it only has to give the exchanges a good start


def hope(statistics: ExpertStatistics, places: Places) -> tuple[Tensor, Tensor]:
    """Select the experts to retain by the least cost p^T F p of the pruned ones.

    Args:
        statistics: of the layer.
        places: how many experts are retained, in how many groups, and which are protected.

    Returns:
        (E,) the cost F_kk of dropping each expert alone, and (N,) the retained experts, ascending.
    """
    matrix = interaction(statistics)
    check_places(len(matrix), places)
    if not torch.isfinite(matrix).all():
        raise ValueError("expert outputs contain NaN or infinity; check the calibration data and the model's weights")
    values = matrix.cpu().numpy()
    if count_sets(len(values), places) <= MAX_SETS:
        kept = min(all_sets(len(values), places), key=lambda kept: _cost(values, kept))
    else:
        starts = [torch.from_numpy(-_relaxed(values, places)), matrix.diagonal().cpu()]
        ends = [_exchanged(values, select_experts(start, *places).tolist(), places) for start in starts]
        kept = min(ends, key=lambda kept: _cost(values, kept))
    return matrix.diagonal().clone(), torch.tensor(kept, device=matrix.device)


def interaction(statistics: ExpertStatistics) -> Tensor:
    """Compute F (E, E), the mean product of two experts' contributions on tokens where both are active."""
    return statistics.coactivation / statistics.together.clamp(min=1)


def _relaxed(matrix: np.ndarray, places: Places) -> np.ndarray:
    """Solve the relaxed problem: p in [0, 1]^E of least p^T F p with the required sum in every group."""
    from scipy.optimize import minimize

    groups = np.arange(len(matrix)).reshape(places.num_groups, -1)
    free = np.ones(len(matrix))
    free[list(places.protected)] = 0.0
    to_prune = groups.shape[1] - places.count // places.num_groups
    start = np.zeros(len(matrix))
    for members in groups:
        start[members] = to_prune * free[members] / max(free[members].sum(), 1)
    scaled = matrix / max(np.abs(matrix).max(), 1e-300)
    membership = np.zeros((len(groups), len(matrix)))
    for group, members in enumerate(groups):
        membership[group, members] = 1.0
    result = minimize(
        lambda p: p @ scaled @ p,
        start,
        jac=lambda p: 2 * scaled @ p,
        method="SLSQP",
        bounds=[(0.0, bound) for bound in free],
        constraints={"type": "eq", "fun": lambda p: membership @ p - to_prune, "jac": lambda p: membership},
        options={"maxiter": ITERATIONS},
    )
    return np.where(np.isfinite(result.x), result.x, start)


def _cost(matrix: np.ndarray, kept: list[int]) -> float:
    """Compute p^T F p, with p = 1 for the experts that are not kept."""
    pruned = np.setdiff1d(np.arange(len(matrix)), kept)
    return float(matrix[np.ix_(pruned, pruned)].sum())


def _exchanged(matrix: np.ndarray, kept: list[int], places: Places) -> list[int]:
    """Improve a set by swapping a pruned and a retained expert of one group, best pair first, until no swap helps."""
    group = np.arange(len(matrix)) // (len(matrix) // places.num_groups)
    pruned, fixed = np.ones(len(matrix), dtype=bool), np.zeros(len(matrix), dtype=bool)
    pruned[kept], fixed[list(places.protected)] = False, True
    diagonal = matrix.diagonal()
    smallest = 1e-12 * np.abs(matrix).max(initial=0.0)  # a gain within rounding could go back and forth for ever
    while True:
        pull = matrix @ pruned  # (E,)
        inside, outside = np.flatnonzero(pruned), np.flatnonzero(~pruned & ~fixed)
        if not len(inside) or not len(outside):
            return np.flatnonzero(~pruned).tolist()
        gain = 2 * pull[inside] - diagonal[inside]
        cost = 2 * pull[outside] + diagonal[outside]
        change = cost - gain[:, None] - 2 * matrix[np.ix_(inside, outside)]  # (pruned, retained)
        change[group[inside][:, None] != group[outside]] = np.inf
        best = np.unravel_index(change.argmin(), change.shape)
        if change[best] >= -smallest:
            return np.flatnonzero(~pruned).tolist()
        pruned[inside[best[0]]], pruned[outside[best[1]]] = False, True
