"""Allocator, memory limits and precision for computations on a layer's experts.

By default tensors are in memory.  For a layer whose experts do not fit, a workspace allocates them in memory-mapped
files: all computations go expert by expert, so only one expert's pages have to be resident.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


__all__ = ["CHUNK_TOKENS", "IN_MEMORY", "MAX_ELEMENTS", "Empty", "Workspace"]

Empty = Callable[..., Tensor]  # signature of `torch.empty(shape, dtype=..., device=...)`
MAX_ELEMENTS = 1 << 26  # 256 MiB in float32
CHUNK_TOKENS = 4096  # small enough for the caches of a CPU, large enough to fill a GPU


class Workspace(NamedTuple):
    """Allocator, memory limits and precision of the steps on a layer; results depend on them only by rounding."""

    empty: Empty = torch.empty  # allocates tensors with an entry for every expert
    max_elements: int = MAX_ELEMENTS  # most elements of any other temporary tensor
    chunk_tokens: int = CHUNK_TOKENS  # tokens in one forward pass of an expert
    products: Callable[[torch.device], AbstractContextManager] = nullcontext  # in which experts are run on a device

    def empty_like(self, tensor: Tensor, count: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate a tensor with the memory layout of another, so that matrix products agree bit for bit.

        Args:
            tensor: (E, ...).
            count: how many experts; by default E.
            dtype: by default that of the tensor.
        """
        order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
        order.sort(key=lambda dim: dim != 0)  # an expert's numbers stay together
        shape = [count if dim == 0 and count is not None else tensor.shape[dim] for dim in order]
        made = self.empty(shape, dtype=dtype or tensor.dtype, device=tensor.device)
        return made.permute([order.index(dim) for dim in range(tensor.dim())])

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy a tensor one expert at a time."""
        return self.select(tensor, torch.arange(len(tensor)), dtype)

    def select(self, tensor: Tensor, experts: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy the entries of some experts (N,) one at a time, in the order given."""
        chosen = self.empty_like(tensor, len(experts), dtype)
        for position, expert in enumerate(experts.tolist()):
            chosen[position] = tensor[expert]
        return chosen


IN_MEMORY = Workspace()
