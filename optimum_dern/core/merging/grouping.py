"""Ways to put the E experts of a layer into N groups, each of which becomes one expert.

Every group has a representative, whose router entries the merged expert takes over.  Where a router is limited to
groups of its own ("router groups": contiguous, of equal size), every one of them keeps the same number of experts, so
experts are grouped inside them only.  All decisions are taken on the CPU in float64, on numbers that are the same in
every process.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .expert_clustering import average_linkage, kmeans_by_cosine


__all__ = ["Grouping", "absorb_nearest", "cluster_by_cosine", "join_nearest", "link_by_average"]


class Grouping(NamedTuple):
    """N groups of E experts."""

    retained: Tensor  # (N,) representatives, ascending
    label: Tensor  # (E,) group of each expert: a position in `retained`

    def members(self, position: int) -> list[int]:
        """The experts of a group, its representative first."""
        representative = self.retained[position].item()
        everyone = (self.label == position).nonzero().flatten().tolist()
        return [representative, *(expert for expert in everyone if expert != representative)]


def join_nearest(retained: Tensor, similarity: Tensor, num_groups: int = 1) -> Grouping:
    """Every other expert joins the representative that it is most similar to.

    Args:
        retained: (N,) representatives, ascending.
        similarity: (E, E).
        num_groups: router groups.

    Returns:
        The grouping; ties go to the lower index.
    """
    retained, similarity = retained.cpu(), _within(similarity, num_groups)
    label = similarity[:, retained].argmax(dim=1)
    label[retained] = torch.arange(len(retained))
    return Grouping(retained, label)


def absorb_nearest(
    retained: Tensor, similarity: Tensor, scores: Tensor, capacity: int, num_groups: int = 1
) -> Grouping:
    """Representatives in turn, the best first, take the experts most similar to them until their group is full.

    Args:
        retained: (N,) representatives, ascending.
        similarity: (E, E).
        scores: (E,) larger goes first.
        capacity: size of a full group; N times it must be at least E.
        num_groups: router groups.

    Returns:
        The grouping: a few large groups around the best experts, the other representatives alone.
    """
    retained, similarity = retained.cpu(), _within(similarity, num_groups)
    label = torch.full((len(similarity),), -1)
    label[retained] = torch.arange(len(retained))
    for position in scores.cpu()[retained].argsort(descending=True, stable=True).tolist():
        free = (label == -1) & similarity[retained[position]].isfinite()
        nearest = similarity[retained[position]].masked_fill(~free, -torch.inf).argsort(descending=True, stable=True)
        label[nearest[: min(capacity - 1, int(free.sum()))]] = position
    if (label < 0).any():
        raise ValueError(f"groups of {capacity} cannot hold {len(label)} experts around {len(retained)}")
    return Grouping(retained, label)


def link_by_average(
    vectors: Tensor, count: int, scores: Tensor, num_groups: int = 1, protected: tuple[int, ...] = ()
) -> Grouping:
    """Hierarchical clustering: the two clusters of least average Euclidean distance are joined until N are left.

    Args:
        vectors: (E, D).
        count: N.
        scores: (E,) the best of a cluster represents it.
        num_groups: router groups.
        protected: experts that must represent a cluster, each its own.

    Returns:
        The grouping; of equal distances the one between lower indices is joined first.
    """
    vectors = vectors.double().cpu()
    label = torch.cat(
        [
            average_linkage(
                torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist"), count // num_groups, inside
            )
            for part, inside in _parts(vectors, num_groups, protected)
        ]
    )
    return _represented(label, count // num_groups, scores, num_groups, protected)


def cluster_by_cosine(
    vectors: Tensor, count: int, scores: Tensor, seed: int = 0, num_groups: int = 1, protected: tuple[int, ...] = ()
) -> Grouping:
    """k-means by direction, started by k-means++.

    Args:
        vectors: (E, D).
        count: N.
        scores: (E,) the best of a cluster represents it.
        seed: of the start.
        num_groups: router groups.
        protected: experts that must represent a cluster, each its own: they start it and stay in it.

    Returns:
        The grouping.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(vectors.double().cpu(), dim=1)
    label = torch.cat(
        [
            kmeans_by_cosine(part, count // num_groups, inside, generator)
            for part, inside in _parts(directions, num_groups, protected)
        ]
    )
    return _represented(label, count // num_groups, scores, num_groups, protected)


def _within(similarity: Tensor, num_groups: int) -> Tensor:
    """The similarity, minus infinity between experts of different router groups."""
    group = torch.arange(len(similarity)) // (len(similarity) // num_groups)
    return similarity.double().cpu().masked_fill(group.unsqueeze(1) != group, -torch.inf)


def _parts(vectors: Tensor, num_groups: int, protected: tuple[int, ...]) -> list[tuple[Tensor, list[int]]]:
    """Per router group, its vectors and where its protected experts are among them."""
    size = len(vectors) // num_groups
    return [
        (part, [expert - start for expert in protected if start <= expert < start + size])
        for start, part in zip(range(0, len(vectors), size), vectors.split(size), strict=True)
    ]


def _represented(
    label: Tensor, per_group: int, scores: Tensor, num_groups: int, protected: tuple[int, ...]
) -> Grouping:
    """The grouping of clusters numbered within each router group, the best member of each representing it."""
    label = label + per_group * (torch.arange(len(label)) // (len(label) // num_groups))
    ranked = scores.double().cpu().clone()
    ranked[list(protected)] = torch.inf
    best = [ranked.masked_fill(label != cluster, -torch.inf).argmax() for cluster in range(per_group * num_groups)]
    retained, order = torch.stack(best).sort()
    return Grouping(retained, order.argsort()[label])
