"""DERN on one layer: move segments of dropped experts to retained ones, and cluster these back to the old width."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape
from ..layer.segments import Segments, similarity_vectors
from ..layer.workspace import MAX_ELEMENTS
from ..neurons.selection import check_scores
from ..router.rows import dropped_experts
from .clustering import initial_centroids, spherical_kmeans


__all__ = ["Map", "Recombination", "assign_segments", "recombine_layer", "recombine_layer_cost"]

Map = Callable[[Callable[[int], tuple[Tensor, ...]], Iterable[int]], Iterable[tuple[Tensor, ...]]]  # as builtin `map`


class Recombination(NamedTuple):
    """A recombined layer with the assignment of its dropped segments; E experts before, N after, f neurons each."""

    segments: Segments  # N experts of width f
    destination: Tensor  # (E - N, f) position among the retained experts, or -1 for a discarded segment
    similarity: Tensor  # (E - N, f) best cosine


def recombine_layer(
    segments: Segments,
    retained: Tensor,
    saliency: Tensor,
    *,
    threshold: float,
    similarity_weights: Sequence[float] = (0.0, 1.0, 1.0),
    init: str = "own",
    iterations: int = 30,
    tolerance: float = 1e-4,
    importance_weighting: bool = True,
    neurons: Tensor | None = None,
    seed: int = 0,
    map_experts: Map = map,
) -> Recombination:
    """Recombine the experts of one layer (DERN, arXiv 2509.10377, steps 2 and 3).

    Args:
        segments: E experts.
        retained: (N,) experts that stay, ascending.
        saliency: (E,) scores; a segment weighs as much as its source expert.
        threshold: alpha, see `assign_segments`.
        similarity_weights: of the gate, up and down projections, see `similarity_vectors`.
        init: initial centroids, see `initial_centroids`.
        iterations: k-means iterations.
        tolerance: k-means stopping rule, see `spherical_kmeans`.
        importance_weighting: weigh segments by saliency instead of evenly.
        neurons: (E, f) importance of single neurons, by which segments weigh instead of by their expert's saliency.
        seed: for random initial centroids.
        map_experts: replacement of the builtin `map` that distributes experts over processes.

    Returns:
        The recombined layer.  An expert that received no segment keeps its weights bit for bit.

    Raises:
        ValueError: importance that is not finite.
    """
    dropped = dropped_experts(len(segments.up), retained)
    gone, kept = torch.cat([dropped, retained]).cpu().split([len(dropped), len(retained)])
    gone, kept = gone.tolist(), kept.tolist()
    destination, similarity = _assign(segments, gone, kept, similarity_weights, threshold, map_experts)

    if neurons is not None:
        check_scores(neurons)
    importance = saliency.double().unsqueeze(1) if neurons is None else neurons.double()  # (E, 1) or (E, f)
    importance = importance if importance_weighting else torch.ones_like(importance)
    importance = (importance / importance.max().clamp(min=1e-300)).to(
        segments.up.device, segments.compute_dtype
    )  # only ratios count: no underflow
    importance = importance.expand(segments.up.shape[:2])  # (E, f)

    width, received = segments.up.shape[1], _received(destination, len(kept))

    def cluster(position: int) -> tuple[Tensor]:
        moved, expert = received[position], kept[position]
        source, neuron = dropped[moved // width], moved % width
        pool, response = _pool(segments, expert, source, neuron)
        weights = torch.cat([importance[expert], importance[source, neuron]])  # (f + m,)
        start = initial_centroids(pool, response, width, init, seed + position)
        return (spherical_kmeans(pool, weights, start, iterations, tolerance, segments.workspace.max_elements)[0],)

    result = segments.select(torch.tensor(kept))  # indexing copies: the input stays as it was
    receiving = [position for position, moved in enumerate(received) if len(moved)]
    for position, (centroids,) in zip(receiving, map_experts(cluster, receiving), strict=True):
        for part, value in zip(result.parts, segments.split(centroids), strict=True):
            part[position] = value
    return Recombination(result, destination, similarity)


def _received(destination: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return which of the dropped segments, all of them in a row, each of `count` retained experts receives."""
    place = destination.flatten() + 1  # 0 for a discarded segment
    counts = place.new_zeros(count + 1).index_add_(0, place, torch.ones_like(place))
    return place.argsort(stable=True).split(counts.tolist())[1:]


def assign_segments(
    dropped: Tensor, retained: Iterable[Tensor], threshold: float, max_elements: int = MAX_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Find the best retained expert for every dropped segment (DERN, arXiv 2509.10377, step 2).

    Args:
        dropped: (M, D) unit vectors of the dropped segments.
        retained: (f, D) unit vectors of the segments of each retained expert in turn.
        threshold: alpha; a segment moves only if its best cosine exceeds it.
        max_elements: bound on the similarities held at once.

    Returns:
        destination (M,) int64, -1 where the segment is discarded, and its best cosine (M,).  Equal cosines go to the
        expert with the lower index.
    """
    best = dropped.new_full((len(dropped),), -torch.inf)
    destination = torch.full((len(dropped),), -1, dtype=torch.int64, device=dropped.device)
    for expert, segments in enumerate(retained):
        rows = max(1, max_elements // len(segments))
        for start in range(0, len(dropped), rows):
            part = slice(start, start + rows)
            cosine = (dropped[part] @ segments.T).amax(dim=1)  # (rows, f) -> (rows,)
            nearer = cosine > best[part]
            best[part] = torch.where(nearer, cosine, best[part])
            destination[part] = torch.where(nearer, expert, destination[part])
    return torch.where(best > threshold, destination, -1), best


def _assign(
    segments: Segments,
    dropped: list[int],
    retained: list[int],
    weights: Sequence[float],
    threshold: float,
    map_experts: Map,
) -> tuple[Tensor, Tensor]:
    """Run `assign_segments` per dropped expert; return destinations and best cosines, (E - N, f) each."""

    def vectors(expert: int) -> Tensor:
        return similarity_vectors(segments.select(slice(expert, expert + 1)).to(segments.compute_dtype), weights)[0]

    def assign(expert: int) -> tuple[Tensor, Tensor]:
        return assign_segments(vectors(expert), map(vectors, retained), threshold, segments.workspace.max_elements)

    nearest = list(map_experts(assign, dropped))
    if not nearest:
        none = segments.up.new_zeros(0, segments.up.shape[1], dtype=segments.compute_dtype)
        return none.long(), none
    destination, similarity = zip(*nearest, strict=True)
    return torch.stack(destination), torch.stack(similarity)


def _pool(segments: Segments, expert: int, source: Tensor, neuron: Tensor) -> tuple[Tensor, Tensor]:
    """Return an expert's own and received segments (f + m, D), and the largest |gate| weight of each (f + m,)."""
    rows = [torch.cat([part[expert], part[source, neuron]]).to(segments.compute_dtype) for part in segments.parts]
    return torch.cat(rows, dim=1), rows[0].abs().amax(dim=1)  # the up projection's where there is no gate


def recombine_layer_cost(shape: LayerShape, iterations: int) -> Cost:
    """Cost of `recombine_layer`, assuming equally many segments per retained expert and a third of the iterations."""
    pool = shape.width * shape.experts // shape.retained  # segments of an expert and those that it receives
    segment = shape.expert // shape.width
    similarities = min(shape.max_elements, pool * shape.width)
    held = 4 * pool * segment + 3 * shape.expert + similarities
    dropped = shape.experts - shape.retained
    compared = segment - shape.inputs * (shape.projections > 2)  # by default gate projections are not compared
    assigned = 2.0 * dropped * shape.width * shape.retained * shape.width * compared
    clustered = 2.0 * shape.retained * pool * shape.width * segment * iterations / 3
    return Cost(shape.number * held, shape.retained * shape.expert * shape.itemsize, assigned + clustered)
