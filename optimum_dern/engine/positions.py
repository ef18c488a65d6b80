"""Which number each calibration token has among those of all processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import ALONE, Processes


__all__ = ["token_positions"]


def token_positions(masks: Sequence[Tensor], processes: Processes = ALONE) -> Tensor:
    """Number the real tokens as if one process had all micro-batches.

    Args:
        masks: of this process's micro-batches, (batch, sequence) bool.
        processes: that share the micro-batches, by `Processes.share`.

    Returns:
        (T,) int64, ascending.
    """
    own = [int(mask.sum()) for mask in masks]
    total = int(processes.reduce(torch.tensor(len(own), device=processes.device)))
    lengths = torch.zeros(total, dtype=torch.int64, device=processes.device)
    lengths[processes.rank :: processes.count] = torch.tensor(own, dtype=torch.int64, device=processes.device)
    lengths = processes.reduce(lengths)
    starts = (lengths.cumsum(0) - lengths)[processes.rank :: processes.count].tolist()
    parts = [torch.arange(start, start + length) for start, length in zip(starts, own, strict=True)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
