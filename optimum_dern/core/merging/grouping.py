"""Algorithms that partition a layer's E experts into N groups, each to be merged into one expert.

Every group has a representative, whose router entries the merged expert takes over.  A group-limited router ("router
groups": contiguous, of equal size) must keep the same number of experts in each of its groups, so experts are merged
within them only.  All decisions are made on the CPU in float64, on numbers that are the same in every process.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..criteria.selection import Places
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


def link_by_average(vectors: Tensor, scores: Tensor, places: Places) -> Grouping:
    """Group experts by hierarchical clustering (average linkage, Euclidean distance) of their feature vectors.

    Args:
        vectors: (E, D).
        scores: (E,) the best of a cluster represents it.
        places: N, router groups, and protected experts, each of which must represent a cluster of its own.

    Returns:
        The grouping; of equal distances the one between lower indices is joined first.
    """
    labels, per_group = [], places.count // places.num_groups
    for part, protected in _parts(vectors.double().cpu(), places):
        distance = torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist")
        labels.append(average_linkage(distance, per_group, protected))
    return _represented(torch.cat(labels), scores, places)


def cluster_by_cosine(vectors: Tensor, scores: Tensor, places: Places, seed: int = 0) -> Grouping:
    """Group experts by k-means with cosine similarity of their feature vectors.

    Args:
        vectors: (E, D).
        scores: (E,) the best of a cluster represents it.
        places: N, router groups, and protected experts, each of which starts a cluster of its own and represents it.
        seed: of the k-means++ initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = _parts(normalize(vectors.double().cpu(), dim=1), places)
    per_group = places.count // places.num_groups
    labels = [kmeans_by_cosine(part, per_group, protected, generator) for part, protected in parts]
    return _represented(torch.cat(labels), scores, places)


def _within(similarity: Tensor, num_groups: int) -> Tensor:
    """Set the similarity of experts in different router groups to minus infinity."""
    group = torch.arange(len(similarity)) // (len(similarity) // num_groups)
    return similarity.double().cpu().masked_fill(group.unsqueeze(1) != group, -torch.inf)


def _parts(vectors: Tensor, places: Places) -> list[tuple[Tensor, list[int]]]:
    """Split vectors by router group; return those of each with the positions of its protected experts."""
    size = len(vectors) // places.num_groups
    return [
        (part, [expert - start for expert in places.protected if start <= expert < start + size])
        for start, part in zip(range(0, len(vectors), size), vectors.split(size), strict=True)
    ]


def _represented(label: Tensor, scores: Tensor, places: Places) -> Grouping:
    """Make a grouping of cluster labels that count within each router group; the best member represents a cluster."""
    group = torch.arange(len(label)) // (len(label) // places.num_groups)
    label = label + places.count // places.num_groups * group
    ranked = scores.double().cpu().clone()
    ranked[list(places.protected)] = torch.inf
    best = [ranked.masked_fill(label != cluster, -torch.inf).argmax() for cluster in range(places.count)]
    retained, order = torch.stack(best).sort()
    return Grouping(retained, order.argsort()[label])
