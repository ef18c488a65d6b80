"""Weighted spherical k-means with norm equalisation (DERN, arXiv 2509.10377, step 3 and eq. 11).

    assign   label_p = argmax_c cos(v_p, c)
    equalise v^_p    = v_p * mean norm of the cluster / |v_p|
    average  c       = sum_p w_p v^_p / sum_p w_p

Exact Lloyd iterations; the (points x clusters) similarity is formed in blocks of rows and never whole.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..layer.workspace import MAX_ELEMENTS


__all__ = ["initial_centroids", "spherical_kmeans"]

ASK_CPU, ASK_GPU = 1, 8  # iterations between two questions whether to stop: a GPU's answer takes long


def initial_centroids(pool: Tensor, response: Tensor, clusters: int, init: str, seed: int = 0) -> Tensor:
    """Select the initial centroids from the segments of a retained expert's pool.

    Args:
        pool: (P, D), the expert's own segments first.
        response: (P,) bound on each segment's gate response, max |gate|.
        clusters: K, at most P.
        init: `"own"` the first K, `"gate"` the K of largest response (the paper's), `"random"`.
        seed: for `"random"` only.

    Returns:
        (K, D).

    Raises:
        ValueError: unknown `init`.
    """
    if init == "own":
        return pool[:clusters]
    if init == "gate":
        return pool[response.argsort(descending=True, stable=True)[:clusters]]
    if init == "random":
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return pool[order[:clusters].to(pool.device)]
    raise ValueError(f"unknown cluster_init {init!r}; choose 'own', 'gate' or 'random'")


def spherical_kmeans(
    points: Tensor,
    weights: Tensor,
    centroids: Tensor,
    iterations: int = 30,
    tolerance: float = 1e-4,
    max_elements: int = MAX_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Run weighted spherical k-means, with centroids rescaled to the mean norm of their cluster.

    Args:
        points: (P, D) segments of one retained expert's pool.
        weights: (P,) >= 0; a cluster whose members all weigh nothing is averaged evenly.
        centroids: (K, D) to start from.
        iterations: at most this many.
        tolerance: stop once |C - C_before| <= tolerance * |C_before| (Frobenius norms).
        max_elements: bound on the similarities held at once.

    Returns:
        centroids (K, D), and labels (P,): the assignment that they average.  An empty cluster keeps its centroid.
    """
    directions, norms = normalize(points, dim=1), points.norm(dim=1)
    labels = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    asks, found = ASK_CPU if points.device.type == "cpu" else ASK_GPU, torch.zeros_like(labels[:1], dtype=torch.bool)
    for number in range(1, iterations + 1):
        nearest = nearest_direction(directions, normalize(centroids, dim=1), max_elements)
        updated = equalised_means(directions, norms, weights, nearest, centroids)
        shift, before = (updated - centroids).norm(), centroids.norm()
        centroids, labels = torch.where(found, centroids, updated), torch.where(found, labels, nearest)
        found |= shift <= tolerance * before  # they stay from then on, whether or not the host knows
        if number % asks == 0 and found:
            break
    return centroids, labels


def nearest_direction(directions: Tensor, centroids: Tensor, max_elements: int = MAX_ELEMENTS) -> Tensor:
    """Return the index (P,) of the nearest unit centroid (K, D) for each unit vector (P, D), the lower one of ties."""
    rows = max(1, max_elements // len(centroids))
    return torch.cat([(part @ centroids.T).argmax(dim=1) for part in directions.split(rows)])


def equalised_means(directions: Tensor, norms: Tensor, weights: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """Compute the weighted mean of each cluster, rescaled to the cluster's mean norm (DERN, eq. 11).

    Args:
        directions: (P, D) unit vectors.
        norms: (P,) lengths of the points.
        weights: (P,).
        labels: (P,) cluster of each point.
        previous: (K, D), kept where a cluster is empty.

    Returns:
        (K, D).
    """

    def per_cluster(values: Tensor) -> Tensor:
        return values.new_zeros(len(previous), *values.shape[1:]).index_add_(0, labels, values)

    size = per_cluster(torch.ones_like(norms))
    weights = torch.where(per_cluster(weights)[labels] > 0, weights, 1.0)
    mean_norm = per_cluster(norms) / size.clamp(min=1)
    mean = per_cluster(directions * weights.unsqueeze(1)) / per_cluster(weights).clamp(min=1e-300).unsqueeze(1)
    return torch.where((size > 0).unsqueeze(1), mean * mean_norm.unsqueeze(1), previous)
