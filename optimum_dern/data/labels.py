"""Labels of the calibration tokens: their numbers, whether they are held out, and which source they are from.

They follow the order in which the sequences were drawn, whichever micro-batches and processes these run in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..machine.processes import ALONE, Processes


__all__ = [
    "POSITION",
    "SOURCE",
    "TokenLabels",
    "enough_tokens",
    "evenly_spaced",
    "first_drawn",
    "label_tokens",
    "model_inputs",
    "real_tokens",
]

# Keys of a calibration batch that the model does not get, each a list with an entry for every sequence.
SOURCE = "source"  # the name of its source
POSITION = "position"  # its number in the order in which the sequences were drawn
HELD_OUT_EVERY = 10  # a tenth of a source's sequences is held out
ENOUGH_TOKENS, ENOUGH_PER_NEURON = 65_536, 32


@dataclass(frozen=True)
class TokenLabels:
    """Labels of T calibration tokens on the CPU, padding left out."""

    held_out: Tensor  # (T,) bool: tokens for judging candidates
    source: Tensor  # (T,) int64: index of the token's source
    names: tuple[str, ...]  # of the sources
    order: Tensor  # (T,) int64: number of each token among those of all processes
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def empty(cls) -> "TokenLabels":
        """Make the labels of no token."""
        number = torch.empty(0, dtype=torch.int64)
        return cls(torch.empty(0, dtype=torch.bool), number, (), number)

    def held_out_on(self, device: torch.device) -> Tensor:
        """Return `held_out` on a device, to which it is copied once for all layers there."""
        if device not in self._copies:
            self._copies[device] = self.held_out.to(device)
        return self._copies[device]


def label_tokens(batches: Sequence[Mapping[str, Any]], processes: Processes = ALONE) -> TokenLabels:
    """Label this process's calibration tokens, the same however the sequences are put into micro-batches.

    Args:
        batches: micro-batches of all processes; `attention_mask` (batch, sequence), 1 for a real token, and for every
            sequence its `source` and `position`; by default all have one source, and the order of the batches.
        processes: that share the micro-batches.

    Returns:
        The labels.  A tenth of each source's sequences is held out: of fewer than ten the last, and of a single one
        its last tenth.
    """
    lengths = [int(length) for batch in batches for length in batch["attention_mask"].sum(1)]
    positions = _positions(batches)
    named = _of_sequences(batches, SOURCE) or [""] * len(lengths)
    drawn = sorted(range(len(lengths)), key=positions.__getitem__)
    names = tuple(dict.fromkeys(named[sequence] for sequence in drawn))
    held_out = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    for name in names:
        own = [sequence for sequence in drawn if named[sequence] == name]
        if len(own) == 1:
            held_out[own[0]][lengths[own[0]] - max(1, lengths[own[0]] // HELD_OUT_EVERY) :] = True
        for sequence in own[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or own[1:][-1:]:
            held_out[sequence][:] = True
    index = [torch.full((length,), names.index(name)) for length, name in zip(lengths, named, strict=True)]
    sizes = [len(batch["attention_mask"]) for batch in batches]
    held_out, index, order = (_share(part, sizes, processes) for part in (held_out, index, _numbers(lengths, drawn)))
    return TokenLabels(held_out, index, names, order)


def first_drawn(batches: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Select the sequences drawn first that have some number of tokens together, or all where there are fewer.

    They are the same however the sequences are put into micro-batches, and stay in theirs.

    Args:
        batches: as in `label_tokens`.
        tokens: that are wanted; whole sequences may have more.
    """
    masks, positions, chosen = [batch["attention_mask"] for batch in batches], _positions(batches), set()
    lengths = dict(zip(positions, (int(length) for mask in masks for length in mask.sum(1)), strict=True))
    for position in sorted(lengths):
        if tokens > 0:
            chosen.add(position)
            tokens -= lengths[position]
    selected, numbers = [], iter(positions)
    for batch, mask in zip(batches, masks, strict=True):
        rows = [row for row in range(len(mask)) if next(numbers) in chosen]
        if rows:
            selected.append({name: _rows(value, rows) for name, value in batch.items()})
    return selected


def _rows(value: Any, rows: list[int]) -> Any:
    """Select the entries of some sequences from a tensor or a list."""
    return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]


def _positions(batches: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """Return the number of each sequence in the order drawn, by default that of the batches."""
    return _of_sequences(batches, POSITION) or range(sum(len(batch["attention_mask"]) for batch in batches))


def _of_sequences(batches: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """Return the entries of all sequences under a key; none where a batch does not have it."""
    return [entry for batch in batches for entry in batch[key]] if all(key in batch for batch in batches) else []


def _numbers(lengths: Sequence[int], drawn: Sequence[int]) -> list[Tensor]:
    """Number the tokens of all sequences, one sequence after the other in the order drawn."""
    numbers, start = [torch.empty(0)] * len(lengths), 0
    for sequence in drawn:
        numbers[sequence] = torch.arange(start, start + lengths[sequence])
        start += lengths[sequence]
    return numbers


def _share(sequences: list[Tensor], sizes: list[int], processes: Processes) -> Tensor:
    """Concatenate the labels of the sequences in this process's micro-batches."""
    start, batches = 0, []
    for size in sizes:
        batches.append(torch.cat(sequences[start : start + size]))
        start += size
    return torch.cat(processes.share(batches))


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the model gets of a calibration batch: everything but the sequences' sources and positions."""
    return {name: value for name, value in batch.items() if name not in (SOURCE, POSITION)}


def real_tokens(mask: Tensor, device: torch.device) -> Tensor | slice:
    """Find the real tokens among the flattened ones of a micro-batch; no GPU has to be asked how many they are.

    Args:
        mask: (batch, sequence) bool on the CPU, True for a real token.
        device: of what is to be indexed.

    Returns:
        (n,) indices on the device, or a slice of all where no token is padding.
    """
    flat = mask.flatten()
    return slice(None) if flat.all() else flat.nonzero().flatten().to(device)


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
        order: (T,) numbers of the tokens, as `TokenLabels` has them.
        wanted: how many, over all processes.
        processes: that share the tokens.

    Returns:
        (T,) bool, True for all tokens if there are no more than wanted.
    """
    return order * wanted % max(processes.total(len(order)), 1) < wanted
