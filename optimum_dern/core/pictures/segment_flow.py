"""Number of segments moved from each dropped to each retained expert, for the report."""

import torch
from torch import Tensor

from ..router.rows import dropped_experts


__all__ = ["segment_flow"]

MAX_LINKS = 512  # only the largest are listed; the sums count all


def segment_flow(destination: Tensor, retained: Tensor) -> dict[str, object]:
    """Count the segments moved from each dropped expert to each retained expert.

    Args:
        destination: (E - N, f) position among the retained experts, -1 for a discarded segment.
        retained: (N,) experts that stay, ascending.

    Returns:
        `width` (f), `moved` (of every dropped expert, ascending), `received` (of every retained expert), and `links`:
        [dropped expert, retained expert, segments] of the largest streams, in the order of the experts.
    """
    streams = torch.stack([(destination == position).sum(1) for position in range(len(retained))], dim=1)
    retained, streams = torch.cat([retained.unsqueeze(0), streams]).cpu().tensor_split([1])  # a GPU is asked once
    retained = retained[0]
    dropped = dropped_experts(len(destination) + len(retained), retained)
    largest = streams.flatten().argsort(descending=True, stable=True)[:MAX_LINKS].sort().values
    source, target = largest // len(retained), largest % len(retained)
    links = torch.stack([dropped[source], retained[target], streams[source, target]], dim=1)
    return {
        "width": destination.shape[1],
        "moved": streams.sum(1).tolist(),
        "received": streams.sum(0).tolist(),
        "links": links[links[:, 2] > 0].tolist(),
    }
