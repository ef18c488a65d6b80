"""The sets of experts that may stay, where they are few enough to try them all."""

import math
from itertools import combinations, product

from .selection import Places


__all__ = ["MAX_SETS", "all_sets", "count_sets", "free_experts"]

MAX_SETS = 500  # as many are all tried


def count_sets(num_experts: int, places: Places) -> int:
    """How many sets of experts the places allow."""
    return math.prod(math.comb(len(members), share) for members, share in _open_places(num_experts, places))


def all_sets(num_experts: int, places: Places) -> list[list[int]]:
    """Every allowed set, in ascending order."""
    parts = [combinations(members, share) for members, share in _open_places(num_experts, places)]
    protected = set(places.protected)
    return sorted(sorted(protected.union(*chosen)) for chosen in product(*parts))


def free_experts(num_experts: int, places: Places) -> list[list[int]]:
    """Per group, the experts that may be dropped."""
    size, protected = num_experts // places.num_groups, set(places.protected)
    groups = [range(start, start + size) for start in range(0, num_experts, size)]
    return [[expert for expert in group if expert not in protected] for group in groups]


def _open_places(num_experts: int, places: Places) -> list[tuple[list[int], int]]:
    """Per group, the experts that may be dropped, and how many of them stay."""
    size, share = num_experts // places.num_groups, places.count // places.num_groups
    free = free_experts(num_experts, places)
    return [(members, share - (size - len(members))) for members in free]
