"""Sums over tokens that several processes may share.

A function that sums over tokens takes a `reduce`, which turns what one process has summed into what all have together,
the same to the bit in each of them.  By default there is one process.  Whatever a function decides (to stop, to leave
an expert alone) it decides on reduced numbers, so that all processes go the same way.
"""

from typing import Protocol

from torch import Tensor


__all__ = ["Reduce", "alone", "any_process", "largest"]


class Reduce(Protocol):
    """From one process's numbers to those of all; it may write into its argument."""

    def __call__(self, local: Tensor, operation: str = "sum") -> Tensor:
        """Sum over the processes, or maximum where `operation` is "max"."""


def alone(local: Tensor, operation: str = "sum") -> Tensor:
    """The `Reduce` of a single process: there is nobody to add."""
    return local


def any_process(flag: Tensor, reduce: Reduce) -> bool:
    """Whether a flag is set in any process."""
    return bool(reduce(flag.int(), "max"))


def largest(values: Tensor, reduce: Reduce) -> Tensor:
    """Maximum over all processes of numbers >= 0, some of which may have none."""
    return reduce(values.max() if values.numel() else values.new_zeros(()), "max")
