"""Algorithms that partition a layer's E experts into N groups, each to be merged into one expert.

Every group has a representative, whose router entries the merged expert takes over.  A group-limited router ("router
groups": contiguous, of equal size) must keep the same number of experts in each of its groups, so experts are merged
within them only.  All decisions are made on the CPU in float64, on numbers that are the same in every process.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .expert_clustering import average_linkage, kmeans_by_cosine


__all__ = ["Grouping", "absorb_nearest", "cluster_by_cosine", "join_nearest", "link_by_average"]


class Grouping(NamedTuple):
    """A partition of E experts into N groups."""

    retained: Tensor  # (N,) representatives, ascending
    label: Tensor  # (E,) group of each expert: a position in `retained`

    def members(self, position: int) -> list[int]:
        """Return the experts of a group, its representative first."""
        representative = self.retained[position].item()
        everyone = (self.label == position).nonzero().flatten().tolist()
        return [representative, *(expert for expert in everyone if expert != representative)]


def join_nearest(retained: Tensor, similarity: Tensor, num_groups: int = 1) -> Grouping:
    """Assign every dropped expert to the most similar representative.

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
    """Let representatives, the best first, absorb their most similar free experts until their group is full.

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
    """Group experts by hierarchical clustering (average linkage, Euclidean distance) of their feature vectors.

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
    """Group experts by k-means with cosine similarity of their feature vectors.

    Args:
        vectors: (E, D).
        count: N.
        scores: (E,) the best of a cluster represents it.
        seed: of the k-means++ initialisation.
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
    """Set the similarity of experts in different router groups to minus infinity."""
    group = torch.arange(len(similarity)) // (len(similarity) // num_groups)
    return similarity.double().cpu().masked_fill(group.unsqueeze(1) != group, -torch.inf)


def _parts(vectors: Tensor, num_groups: int, protected: tuple[int, ...]) -> list[tuple[Tensor, list[int]]]:
    """Split vectors by router group; return those of each with the positions of its protected experts."""
    size = len(vectors) // num_groups
    return [
        (part, [expert - start for expert in protected if start <= expert < start + size])
        for start, part in zip(range(0, len(vectors), size), vectors.split(size), strict=True)
    ]


def _represented(
    label: Tensor, per_group: int, scores: Tensor, num_groups: int, protected: tuple[int, ...]
) -> Grouping:
    """Make a grouping of cluster labels that count within each router group; the best member represents a cluster."""
    label = label + per_group * (torch.arange(len(label)) // (len(label) // num_groups))
    ranked = scores.double().cpu().clone()
    ranked[list(protected)] = torch.inf
    best = [ranked.masked_fill(label != cluster, -torch.inf).argmax() for cluster in range(per_group * num_groups)]
    retained, order = torch.stack(best).sort()
    return Grouping(retained, order.argsort()[label])
