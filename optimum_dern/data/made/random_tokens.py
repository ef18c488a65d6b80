"""Calibration sequences of uniformly random token ids, which exercise experts that the other text does not reach."""

from collections.abc import Iterable

import torch
from torch import Tensor


__all__ = ["random_sequences"]


def random_sequences(
    count: int, length: int, vocabulary: int, left_out: Iterable[int], seed: int, bos: int | None = None
) -> list[Tensor]:
    """Draw sequences of token ids, each id equally likely.

    Args:
        count: number of sequences.
        length: tokens of each.
        vocabulary: ids are below this.
        left_out: ids that are not drawn, such as those of special tokens.
        seed: of the draw; the global random state stays as it is.
        bos: id that every sequence begins with, where the tokenizer adds one.

    Returns:
        `count` tensors (length,) int64.
    """
    usable = torch.ones(vocabulary, dtype=torch.bool)
    usable[[token for token in left_out if token < vocabulary]] = False
    ids = usable.nonzero().flatten()
    chosen = torch.randint(len(ids), (count, length), generator=torch.Generator().manual_seed(seed))
    sequences = ids[chosen]  # (count, length)
    if bos is not None:
        sequences[:, 0] = bos
    return list(sequences)
