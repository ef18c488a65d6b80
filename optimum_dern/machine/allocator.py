"""Have glibc's allocator return freed memory to the system; on other systems nothing is done."""

import ctypes
import sys


__all__ = ["return_free_memory", "return_large_blocks"]

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
MIB = 1 << 20


def return_large_blocks() -> None:
    """Make glibc allocate blocks of 1 MiB or more by mmap in this process.

    By default glibc raises this threshold up to 32 MiB once such blocks are freed, so weights that are loaded one
    expert at a time end up in the heap, which cannot shrink below blocks still in use.  It costs time where arithmetic
    makes many such blocks (small models take twice as long), so only runs with a memory limit use it.
    """
    _call("mallopt", M_MMAP_THRESHOLD, MIB)


def return_free_memory() -> None:
    """Return what is free inside glibc's heap to the system, so that the peak of what follows does not stand on it.

    It takes some hundredths of a second.
    """
    _call("malloc_trim", 0)


def _call(name: str, *numbers: int) -> None:
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, name):  # not in musl
            getattr(library, name)(*numbers)
