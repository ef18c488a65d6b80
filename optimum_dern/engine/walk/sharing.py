"""Deduplication of equal tensors, such as the positions and masks of micro-batches of the same shape."""

import torch
from torch import Tensor


__all__ = ["SharedTensors"]


class SharedTensors:
    """Replaces every tensor by the first one that is equal to it, so that equal tensors take memory once.

    The masks of eager attention would take most: batch x sequence x sequence numbers for every micro-batch.
    """

    def __init__(self) -> None:
        self._first: dict[tuple, list[Tensor]] = {}  # by a hash, which unequal tensors may share
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # by id: all layers of a micro-batch get the same tensors

    def next_batch(self) -> None:
        """Forget the tensors seen by identity, so that those replaced by an equal one are freed."""
        self._seen.clear()

    def share(self, value: object) -> object:
        """Return a value with its tensors, also those in tuples, replaced by the first equal ones."""
        if type(value) is tuple:
            return tuple(map(self.share, value))
        if type(value) is not Tensor:
            return value
        if id(value) not in self._seen:
            self._seen[id(value)] = value, self._first_equal(value)
        return self._seen[id(value)][1]

    def _first_equal(self, value: Tensor) -> Tensor:
        content = _bytes(value)
        candidates = self._first.setdefault((value.shape, value.dtype, value.device, _digest(content)), [])
        for first in candidates:
            if torch.equal(_bytes(first), content):  # NaN and zeros of either sign are told apart by their bytes
                return first
        candidates.append(value)
        return value


def _digest(content: Tensor) -> int:
    """Hash the bytes of a tensor, to look up equal ones."""
    return hash(content.cpu().numpy().tobytes())


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(-1).view(torch.uint8)
