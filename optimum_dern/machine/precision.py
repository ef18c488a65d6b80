"""Products in TF32 on CUDA GPUs, set for one computation and restored after it.

TF32 rounds the inputs of a float32 product to 10 bits of mantissa and sums in float32, on units several times as fast.
The setting is the process's: products that other threads compute on a GPU meanwhile are rounded, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch


__all__ = ["drawn_in_tf32", "products_in_tf32"]

T = TypeVar("T")


@contextmanager
def products_in_tf32(device: torch.device) -> Iterator[None]:
    """Round the inputs of float32 products on CUDA GPUs until the context exits; nothing changes elsewhere.

    Args:
        device: of the tensors.
    """
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)
    before = getattr(settings, name)  # torch 2.9 has both, and refuses to read the older after the newer is set
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def drawn_in_tf32(made: Iterator[T], device: torch.device) -> Iterator[T]:
    """Draw what an iterator computes in `products_in_tf32`; what is computed between two of them is not rounded."""
    while True:
        with products_in_tf32(device):
            found = next(made, None)
        if found is None:
            return
        yield found
