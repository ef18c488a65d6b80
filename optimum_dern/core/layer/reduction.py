"""Sums over calibration tokens that are distributed over several processes.

A function that sums over tokens takes a `reduce`, which adds up the sums of all processes; the result is the same to
the bit in each of them.  The default is a single process.  Decisions, such as to stop or to skip an expert, are made
on reduced numbers, so that all processes make the same ones.
"""

from typing import Protocol

from torch import Tensor


__all__ = ["Reduce", "alone", "any_process", "largest"]


class Reduce(Protocol):
    """Function that reduces a tensor over all processes; it may write into its argument."""

    def __call__(self, local: Tensor, operation: str = "sum") -> Tensor:
        """Return the sum over all processes, or the maximum if `operation` is "max"."""


def alone(local: Tensor, operation: str = "sum") -> Tensor:
    """Return the tensor unchanged: the `Reduce` of a single process."""
    return local


def any_process(flag: Tensor, reduce: Reduce) -> bool:
    """Return whether a flag is set in any process."""
    return bool(reduce(flag.int(), "max"))


def largest(values: Tensor, reduce: Reduce) -> Tensor:
    """Return the maximum over all processes of values >= 0; a process may have no values."""
    return reduce(values.max() if values.numel() else values.new_zeros(()), "max")
