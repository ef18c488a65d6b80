"""Assignment of dropped experts' neuron segments to the retained experts with the most similar segments."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..layer.workspace import MAX_ELEMENTS


__all__ = ["assign_segments"]


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
