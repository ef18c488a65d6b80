"""Slots: where each expert is chosen among the k choices of some tokens, which experts are run by."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


__all__ = ["slots_by_expert"]


def slots_by_expert(batches: Sequence[Tensor], num_experts: int) -> Iterator[tuple[Tensor, ...]]:
    """Find the slots in which each expert is chosen, for one or more batches of tokens.

    A GPU has to be asked how many these are: the host waits once for all batches, so give many at a time.

    Args:
        batches: (n, k) expert of each slot, per batch; at least one batch.
        num_experts: N.

    Yields:
        Per batch, the slots of each of the N experts, ascending: their positions in the flattened (n k,) batch.
    """
    flat = [index.flatten() for index in batches]  # (n k,) each
    counts = [index.new_zeros(num_experts).index_add_(0, index, torch.ones_like(index)) for index in flat]
    for index, count in zip(flat, torch.stack(counts).tolist(), strict=True):  # bincount would wait, too
        yield index.argsort(stable=True).split(count)
