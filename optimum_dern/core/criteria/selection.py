"""Selection of the retained experts, by score or among all sets, under router groups, protection and counts."""

import math
from collections.abc import Collection
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor


__all__ = [
    "MAX_SETS",
    "Places",
    "all_sets",
    "check_places",
    "count_sets",
    "free_experts",
    "retained_count",
    "select_experts",
]

MAX_SETS = 500  # up to this many, every set is tried


class Places(NamedTuple):
    """Number of retained experts of a layer, with the router groups and protected experts that constrain them."""

    count: int
    num_groups: int = 1  # contiguous groups of a group-limited router, each of which keeps `count / num_groups`
    protected: Collection[int] = ()  # experts that are never dropped


def retained_count(num_experts: int, sparsity: float, num_groups: int = 1, multiple_of: int = 1) -> int:
    """Compute the number of retained experts from a sparsity.

    Args:
        num_experts: E.
        sparsity: fraction dropped, in [0, 1).
        num_groups: groups of a group-limited router; every group keeps the same number.
        multiple_of: round up to a multiple of this (serving kernels like 4 or 8), but never above E.

    Returns:
        The smallest allowed count that drops no more than the fraction asked for.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be at least 0 and below 1 (the fraction dropped)")
    exact = round(num_experts * (1 - sparsity), 9)  # 10 * (1 - 0.7) is 3.0000000000000004: not 4 experts
    step = math.lcm(num_groups, multiple_of)
    return min(num_experts, max(1, math.ceil(exact / step)) * step)


def select_experts(scores: Tensor, count: int, num_groups: int = 1, protected: Collection[int] = ()) -> Tensor:
    """Select the experts of highest score, in their original order.

    Args:
        scores: (E,) larger is more important; equal scores go by index.
        count: how many stay.
        num_groups: contiguous groups of a group-limited router, each of which keeps `count / num_groups`.
        protected: experts that stay whatever their score.

    Returns:
        (count,) int64, ascending.

    Raises:
        ValueError: a count that the groups cannot share, or more protected experts than places.
    """
    check_places(len(scores), Places(count, num_groups, protected))
    ranked = scores.double().clone()
    if not torch.isfinite(ranked).all():
        raise ValueError("expert scores contain NaN or infinity; check the calibration data and the model's weights")
    if protected:
        ranked[list(protected)] = math.inf
    groups = ranked.view(num_groups, -1)  # (groups, E / groups)
    best = groups.argsort(dim=1, descending=True, stable=True)[:, : count // num_groups]
    offsets = torch.arange(num_groups, device=best.device).unsqueeze(1) * (len(scores) // num_groups)
    return (best + offsets).flatten().sort().values


def check_places(num_experts: int, places: Places) -> None:
    """Check that the constraints can be met by a layer of E experts.

    Args:
        num_experts: E.
        places: the requested count, groups and protected experts.

    Raises:
        ValueError: a count that the groups cannot share, or protected experts that do not exist or do not fit.
    """
    count, num_groups, protected = places
    if not 1 <= count <= num_experts:
        raise ValueError(f"cannot retain {count} of {num_experts} experts; choose 1 to {num_experts}")
    if num_experts % num_groups or count % num_groups:
        raise ValueError(
            f"{count} of {num_experts} experts cannot be shared equally by {num_groups} router groups; "
            f"choose a multiple of {num_groups}"
        )
    outside = [expert for expert in protected if not 0 <= expert < num_experts]
    if outside:
        raise ValueError(f"protected experts {outside} do not exist; the layer has experts 0 to {num_experts - 1}")
    size = num_experts // num_groups
    crowded = max(sum(expert // size == group for expert in set(protected)) for group in range(num_groups))
    if crowded > count // num_groups:
        raise ValueError(f"{crowded} protected experts share {count // num_groups} places; protect fewer or keep more")


def count_sets(num_experts: int, places: Places) -> int:
    """Count the admissible sets of retained experts."""
    return math.prod(math.comb(len(members), share) for members, share in _open_places(num_experts, places))


def all_sets(num_experts: int, places: Places) -> list[list[int]]:
    """List every admissible set of retained experts, in ascending order."""
    parts = [combinations(members, share) for members, share in _open_places(num_experts, places)]
    return sorted(sorted({*places.protected}.union(*chosen)) for chosen in product(*parts))


def free_experts(num_experts: int, places: Places) -> list[list[int]]:
    """List the unprotected experts of each router group."""
    size, protected = num_experts // places.num_groups, set(places.protected)
    groups = [range(start, start + size) for start in range(0, num_experts, size)]
    return [[expert for expert in group if expert not in protected] for group in groups]


def _open_places(num_experts: int, places: Places) -> list[tuple[list[int], int]]:
    """List the unprotected experts of each router group, and how many of them are retained."""
    size, share = num_experts // places.num_groups, places.count // places.num_groups
    return [(members, share - (size - len(members))) for members in free_experts(num_experts, places)]
