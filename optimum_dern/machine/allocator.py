"""Large blocks go back to the system when they are freed."""

import ctypes
import sys


__all__ = ["return_large_blocks"]

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
MIB = 1 << 20


def return_large_blocks() -> None:
    """Tell glibc to map every block of a MiB or more by itself, for this process; nothing on other systems.

    By itself it raises that limit to 32 MiB once such blocks are freed, so weights that are loaded one expert at a
    time end up in the heap, which cannot shrink around what is still in use.  It costs time where arithmetic makes
    many such blocks (twice as long for small models), so only a run with a memory bound asks for it.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(M_MMAP_THRESHOLD, MIB)
