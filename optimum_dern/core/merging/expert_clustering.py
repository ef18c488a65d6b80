"""Deterministic clustering of a layer's experts by feature vectors: average linkage and cosine k-means."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


__all__ = ["average_linkage", "kmeans_by_cosine"]

ITERATIONS = 100  # at most; k-means ends when nothing changes


def average_linkage(distance: Tensor, count: int, apart: list[int]) -> Tensor:
    """Cluster points agglomeratively with average linkage, down to a given number of clusters.

    Args:
        distance: (n, n) between points; of equal ones the one between lower indices goes first.
        count: number of clusters, at least the number of points in `apart`.
        apart: points that must not end up together.

    Returns:
        (n,) cluster of each point, 0 to count - 1.
    """
    distance = distance.clone()
    distance.fill_diagonal_(torch.inf)
    distance[torch.tensor(apart, dtype=torch.long).unsqueeze(1), apart] = torch.inf  # averages stay infinite
    label, size = torch.arange(len(distance)), torch.ones(len(distance), dtype=torch.float64)
    for _ in range(len(distance) - count):
        first, second = sorted(divmod(distance.argmin().item(), len(distance)))
        row = (size[first] * distance[first] + size[second] * distance[second]) / (size[first] + size[second])
        distance[first], distance[:, first] = row, row
        distance[second], distance[:, second] = torch.inf, torch.inf
        distance[first, first] = torch.inf
        size[first] += size[second]
        label[label == second] = first
    return label.unique(return_inverse=True)[1]


def kmeans_by_cosine(directions: Tensor, count: int, pinned: list[int], generator: torch.Generator) -> Tensor:
    """Cluster unit vectors by k-means with cosine similarity, started by k-means++.

    Args:
        directions: (n, D) unit vectors.
        count: clusters.
        pinned: points that start a cluster of their own each, and stay in it.
        generator: draws the other starts.

    Returns:
        (n,) cluster of each point, 0 to count - 1, none of them empty.
    """
    centres = directions[_spread(directions, count, pinned, generator)]
    label = torch.full((len(directions),), -1)
    for _ in range(ITERATIONS):
        similarity = directions @ centres.T  # (n, count)
        updated = similarity.argmax(dim=1)
        updated[pinned] = torch.arange(len(pinned))
        _fill_empty(updated, similarity, count, pinned)
        if torch.equal(updated, label):
            break
        label = updated
        sums = torch.zeros_like(centres).index_add_(0, label, directions)
        centres = normalize(sums, dim=1)
    return label


def _spread(directions: Tensor, count: int, pinned: list[int], generator: torch.Generator) -> list[int]:
    """Draw initial centres by k-means++: with probability proportional to 1 - cosine to the nearest centre so far."""
    chosen = pinned or [int(torch.randint(len(directions), (1,), generator=generator))]
    while len(chosen) < count:
        chance = (1 - (directions @ directions[chosen].T).amax(dim=1)).clamp(min=0) + 1e-12
        chance[chosen] = 0  # equal points may be drawn, the chosen ones may not
        chosen = [*chosen, int(torch.multinomial(chance, 1, generator=generator))]
    return chosen


def _fill_empty(label: Tensor, similarity: Tensor, count: int, pinned: list[int]) -> None:
    """Fill each empty cluster, in place, with the point least similar to its centre in a cluster of several points."""
    for cluster in range(count):
        if (label == cluster).any():
            continue
        own = similarity.gather(1, label.unsqueeze(1)).squeeze(1)
        alone = label.bincount(minlength=count)[label] == 1
        own = own.masked_fill(alone, torch.inf)
        own[pinned] = torch.inf
        label[own.argmin()] = cluster
