"""Cosine similarities of a layer's experts, of whole experts and of their neurons, for the report.

The observation that DERN (arXiv 2509.10377) starts from: two experts whose weights are similar as a whole may
have neurons that match one another well, badly, or not at all.  The map does not affect the compression, so its work
is a small part of it: rows and neurons are sampled, with a random generator of their own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..layer.cost import Cost, LayerShape
from ..layer.segments import Segments


__all__ = ["similarity_map", "similarity_map_cost"]

MAX_EXPERTS = 32  # in the map; a random sample if the layer has more
MAX_ELEMENTS = 1 << 19  # most weights used for the experts' cosines, 16 thousand of each: standard error below 1 %
MAX_PRODUCTS = 1 << 34  # most multiplications for the neurons' cosines: a second on a core
MAX_NEURONS = 16  # most neurons per expert whose best match is computed, among all of the other expert's
BLOCK = 1 << 20  # elements of one temporary tensor, in float32
BINS = 20  # of the histogram, from 0 to 1
RANKS = (0.1, 0.5, 0.9)  # quantiles of an expert's best matches


def similarity_map(segments: Segments, weights: Sequence[float], seed: int = 0) -> dict[str, object] | None:
    """Compute cosines between experts, and between each expert's neurons and those of its most similar expert.

    Args:
        segments: E experts.
        weights: of the gate, up and down projection in the cosine of two neurons, not all zero.
        seed: of the sample.

    Returns:
        `experts` (indices; at most 32), `cosines` between them (the pairs (0, 1), (0, 2), ... (1, 2), ...), `nearest`
        (per expert: the one most like it, their cosine, and the 10, 50 and 90 % quantiles of its neurons' best cosine
        there), `histogram` (of these best cosines, 20 bins from 0 to 1; negative ones are in the first), and `neurons`
        (how many of each expert were looked at).  Cosines are in whole percent.  None where there is a single expert.
    """
    count, width, _ = segments.up.shape
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    experts = _sample(count, MAX_EXPERTS, generator)
    size = sum(part.shape[-1] for part in segments.parts)  # numbers in a segment
    rows = _sample(width, MAX_ELEMENTS // (len(experts) * size), generator)
    neurons = _sample(width, min(MAX_NEURONS, MAX_PRODUCTS // (len(experts) * width * size)), generator)
    drawn = experts, rows, neurons
    there = torch.cat(drawn).to(segments.up.device).split([len(part) for part in drawn])  # one copy for all
    cosines = _expert_cosines(segments, *there[:2]).cpu()
    nearest = (cosines - 2 * torch.eye(len(experts), dtype=cosines.dtype)).argmax(dim=1)  # exclude the expert itself
    order = nearest.argsort(stable=True)  # experts with the same nearest one together
    others, counts = nearest[order].unique_consecutive(return_counts=True)
    chosen = experts[order].to(segments.up.device).split(counts.tolist())
    found = [
        _best_matches(segments, alike, there[2], experts[other].item(), weights).float()
        for other, alike in zip(others.tolist(), chosen, strict=True)
    ]
    best = torch.cat(found).cpu()[order.argsort()]  # (experts, neurons)
    ranks = [round(rank * (len(neurons) - 1)) for rank in RANKS]
    quantiles = best.sort(dim=1).values[:, ranks]
    pairs = torch.triu_indices(len(experts), len(experts), offset=1)
    return {
        "experts": experts.tolist(),
        "cosines": _percent(cosines[pairs[0], pairs[1]]),
        "nearest": [
            [experts[j].item(), *_percent(cosines[i, j].reshape(1)), *_percent(quantiles[i])]
            for i, j in enumerate(nearest.tolist())
        ],
        "histogram": torch.histc(best.clamp(0, 1).double(), BINS, 0, 1).long().tolist(),
        "neurons": len(neurons),
    }


def similarity_map_cost(shape: LayerShape) -> Cost:
    """Cost of `similarity_map`."""
    block = min(BLOCK, shape.experts * shape.width * shape.inputs)
    sampled = min(shape.width, MAX_NEURONS) * min(shape.experts, MAX_EXPERTS)
    rows = 2 * sampled * shape.expert // shape.width  # the sampled neurons, all of one nearest expert at worst
    return Cost(shape.number * (3 * block + rows), 0, 2.0 * sampled * shape.expert)


def _sample(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """Draw at most `limit` (but at least one) of `count` indices, ascending, on the CPU."""
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[: max(1, limit)].sort().values


def _expert_cosines(segments: Segments, experts: Tensor, rows: Tensor) -> Tensor:
    """Compute the cosines (experts, experts) of experts as vectors of all their weights, in float64."""
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64, device=experts.device)
    for part in segments.parts:
        step = max(1, BLOCK // (len(experts) * part.shape[-1]))
        for block in rows.split(step):
            values = _rows(part, experts, block).to(segments.compute_dtype).flatten(1)
            gram += values @ values.T
    norms = gram.diagonal().sqrt().clamp(min=1e-300)
    return (gram / norms / norms[:, None]).nan_to_num(0).clamp(-1, 1)


def _best_matches(
    segments: Segments, experts: Tensor, neurons: Tensor, other: int, weights: Sequence[float]
) -> Tensor:
    """Compute the best cosine (experts, neurons) of some experts' neurons with any of another expert's."""
    pairs = [(part, weight) for part, weight in zip(segments[:3], weights, strict=True) if part is not None and weight]
    total, dtype = sum(weight for _, weight in pairs), segments.compute_dtype
    own = [normalize(_rows(part, experts, neurons).to(dtype), dim=-1) for part, _ in pairs]  # (experts, neurons, d)
    found = []
    step = max(1, BLOCK // max(part.shape[-1] for part, _ in pairs))
    for start in range(0, segments.up.shape[1], step):
        cosines = 0
        for (part, weight), mine in zip(pairs, own, strict=True):
            theirs = part[other, start : start + step].to(dtype)  # (block, d or o)
            norms = (theirs.square() @ theirs.new_ones(theirs.shape[1])).sqrt()  # fast for transposed views, too
            cosines += (mine @ theirs.T) * (weight / total / norms.clamp(min=1e-12))
        found.append(cosines.amax(dim=-1))
    return torch.stack(found).amax(dim=0).nan_to_num(0)


def _rows(part: Tensor, experts: Tensor, rows: Tensor) -> Tensor:
    """Copy the same rows of some experts: (experts, rows, width of the part)."""
    return part[experts[:, None], rows]


def _percent(values: Tensor) -> list[int]:
    return [math.floor(100 * value + 0.5) for value in values.tolist()]
