"""Labels of the calibration tokens: their numbers, whether they are held out, and which source they are from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..machine.processes import ALONE, Processes


__all__ = [
    "SOURCE",
    "TokenLabels",
    "enough_tokens",
    "evenly_spaced",
    "label_tokens",
    "sources_of",
    "token_order",
]

SOURCE = "source"  # key of a calibration batch: the name of every sequence's source
HELD_OUT_EVERY = 10  # a tenth of a source's sequences is held out
ENOUGH_TOKENS, ENOUGH_PER_NEURON = 65_536, 32


@dataclass(frozen=True)
class TokenLabels:
    """Labels of T calibration tokens, padding left out."""

    held_out: Tensor  # (T,) bool: tokens for judging candidates
    source: Tensor  # (T,) int64: index of the token's source
    names: tuple[str, ...]  # of the sources

    @classmethod
    def empty(cls) -> "TokenLabels":
        """Make the labels of no token."""
        return cls(torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.int64), ())

    def on(self, device: torch.device) -> "TokenLabels":
        """Return the labels on a device."""
        return TokenLabels(self.held_out.to(device), self.source.to(device), self.names)


def label_tokens(
    masks: Sequence[Tensor], sources: Sequence[Sequence[str]] | None = None, processes: Processes = ALONE
) -> TokenLabels:
    """Label this process's calibration tokens, the same whether one process or several share the micro-batches.

    Args:
        masks: per micro-batch of all processes, (batch, sequence) bool, True for a real token.
        sources: per micro-batch, the name of every sequence's source; None where all have the same.
        processes: that share the micro-batches.

    Returns:
        The labels.  A tenth of each source's sequences is held out: of fewer than ten the last, and of a single one
        its last tenth.
    """
    lengths = [int(length) for mask in masks for length in mask.sum(1)]
    named = [""] * len(lengths) if sources is None else [name for batch in sources for name in batch]
    names = tuple(dict.fromkeys(named))
    held_out = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    for name in names:
        own = [sequence for sequence, other in enumerate(named) if other == name]
        if len(own) == 1:
            held_out[own[0]][lengths[own[0]] - max(1, lengths[own[0]] // HELD_OUT_EVERY) :] = True
        for sequence in own[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or own[1:][-1:]:
            held_out[sequence][:] = True
    index = [torch.full((length,), names.index(name)) for length, name in zip(lengths, named, strict=True)]
    sizes = [len(mask) for mask in masks]
    return TokenLabels(_share(held_out, sizes, processes), _share(index, sizes, processes), names)


def sources_of(batches: Sequence[Mapping]) -> list[Sequence[str]] | None:
    """Return the names of the sequences' sources per batch, or None where the batches do not tell."""
    return [batch[SOURCE] for batch in batches] if all(SOURCE in batch for batch in batches) else None


def _share(sequences: list[Tensor], sizes: list[int], processes: Processes) -> Tensor:
    """Concatenate the labels of the sequences in this process's micro-batches."""
    start, batches = 0, []
    for size in sizes:
        batches.append(torch.cat(sequences[start : start + size]))
        start += size
    return torch.cat(processes.share(batches))


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
