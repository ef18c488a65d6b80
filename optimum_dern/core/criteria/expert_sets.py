"""Enumeration of all admissible sets of retained experts, for exhaustive search."""

import math
from itertools import combinations, product

from .selection import Places


__all__ = ["MAX_SETS", "all_sets", "count_sets", "free_experts"]

MAX_SETS = 500  # up to this many, every set is tried


def count_sets(num_experts: int, places: Places) -> int:
    """Count the admissible sets of retained experts."""
    return math.prod(math.comb(len(members), share) for members, share in _open_places(num_experts, places))


def all_sets(num_experts: int, places: Places) -> list[list[int]]:
    """List every admissible set of retained experts, in ascending order."""
    parts = [combinations(members, share) for members, share in _open_places(num_experts, places)]
    protected = set(places.protected)
    return sorted(sorted(protected.union(*chosen)) for chosen in product(*parts))


def free_experts(num_experts: int, places: Places) -> list[list[int]]:
    """List the unprotected experts of each router group."""
    size, protected = num_experts // places.num_groups, set(places.protected)
    groups = [range(start, start + size) for start in range(0, num_experts, size)]
    return [[expert for expert in group if expert not in protected] for group in groups]


def _open_places(num_experts: int, places: Places) -> list[tuple[list[int], int]]:
    """List the unprotected experts of each router group, and how many of them are retained."""
    size, share = num_experts // places.num_groups, places.count // places.num_groups
    free = free_experts(num_experts, places)
    return [(members, share - (size - len(members))) for members in free]
