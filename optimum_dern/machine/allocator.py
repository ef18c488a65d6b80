"""Configure glibc's allocator to return large freed blocks to the system."""

import ctypes
import sys


__all__ = ["return_large_blocks"]

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
MIB = 1 << 20


def return_large_blocks() -> None:
    """Make glibc allocate blocks of 1 MiB or more by mmap in this process; does nothing on other systems.

    By default glibc raises this threshold up to 32 MiB once such blocks are freed, so weights that are loaded one
    expert at a time end up in the heap, which cannot shrink below blocks still in use.  It costs time where arithmetic
    makes many such blocks (small models take twice as long), so only runs with a memory limit use it.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(M_MMAP_THRESHOLD, MIB)
