"""Equal tensors kept once: micro-batches of one shape have the same positions, and without padding the same masks."""

import torch
from torch import Tensor


__all__ = ["SharedTensors"]


class SharedTensors:
    """Hands out the first of equal tensors.

    An eager attention mask takes sequence length times as many numbers as there are tokens, for every micro-batch.
    """

    def __init__(self) -> None:
        self._first: dict[tuple, list[Tensor]] = {}  # by a digest, which unequal tensors may have in common
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: all layers of a micro-batch get the same ones

    def next_batch(self) -> None:
        """Forget which tensors were seen, so that those of which there is an equal one can go."""
        self._seen.clear()

    def share(self, value: object) -> object:
        """The value, its tensors replaced by the first equal ones, also in tuples."""
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
    """Hash of the bytes of a tensor, to find equal ones by."""
    return hash(content.cpu().numpy().tobytes())


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(-1).view(torch.uint8)
