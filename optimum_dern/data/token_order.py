"""Global numbering of calibration tokens across processes, and evenly spaced samples of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..machine.processes import ALONE, Processes


__all__ = ["enough_tokens", "evenly_spaced", "token_order"]

ENOUGH_TOKENS, ENOUGH_PER_NEURON = 65_536, 32


def token_order(masks: Sequence[Tensor], processes: Processes = ALONE) -> Tensor:
    """Number this process's non-padding tokens as if one process had all micro-batches.

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


def enough_tokens(neurons: int, top_k: int) -> int:
    """Return how many tokens the closed-form refits need if a neuron refit follows.

    Args:
        neurons: number of neurons of all retained experts together.
        top_k: experts per token.
    """
    return max(ENOUGH_TOKENS, ENOUGH_PER_NEURON * neurons // top_k)


def evenly_spaced(order: Tensor, wanted: int, processes: Processes = ALONE) -> Tensor:
    """Mark about `wanted` evenly spaced tokens, independent of their distribution over processes.

    Args:
        order: (T,) numbers of the tokens, from `token_order`.
        wanted: how many, over all processes.
        processes: that share the tokens.

    Returns:
        (T,) bool, True for all tokens if there are no more than wanted.
    """
    total = int(processes.reduce(torch.tensor(len(order), device=processes.device)))
    return order * wanted % max(total, 1) < wanted
