"""Tensors in files instead of memory, for what is as large as a layer that does not fit.

Each tensor is a memory-mapped file without a name: its space is given back with the tensor, and no file is left behind
however the process ends.  The system may write mapped pages back and reuse their memory at any time; a watching thread
hands back those that are still mapped beyond a bound, so that the process does not even seem to hold them.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from ..core.layer.workspace import Workspace


__all__ = ["CopiesInFiles", "Scratch", "open_workspace"]

SMALL = 1 << 20  # smaller tensors stay in memory
INTERVAL = 0.01  # seconds between two looks of the watching thread
BLOCK = 64 << 20  # bytes of a file that holds several tensors
STATISTICS = Path("/proc/self/statm")


class Scratch:
    """Makes tensors in a folder.

    Args:
        folder: on a disk with room for them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: WeakSet[mmap.mmap] = WeakSet()
        self._lock = threading.Lock()  # tensors are made while the watching thread looks at them

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """As `torch.empty`; tensors that are small or not on the CPU are made in memory.

        Raises:
            OSError: no room on the disk.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < SMALL or torch.device(device).type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        mapped = map_file(self.folder, size)
        with self._lock:
            self._mapped.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    def unmap_pages(self) -> None:
        """Let go of the pages of all tensors; their content stays, and comes back when it is used."""
        with self._lock:
            present = list(self._mapped)
        for mapped in present:
            unmap_pages(mapped)

    @contextmanager
    def bounded(self, resident: int) -> Iterator[None]:
        """While the context is open, keep mapped pages near a bound in bytes, where the system tells how many are."""
        if not STATISTICS.exists():
            yield
            return
        done = threading.Event()

        def watch() -> None:
            others = resident_in_files()  # libraries
            while not done.wait(INTERVAL):
                if resident_in_files() - others > resident:
                    self.unmap_pages()
                    others = resident_in_files()  # more of them may be in use by now

        thread = threading.Thread(target=watch, name="scratch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class CopiesInFiles:
    """Copies of many tensors, in few files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: list[mmap.mmap] = []
        self._used = 0  # bytes of the last file

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy in a file."""
        if not self._mapped or self._used + tensor.nbytes > len(self._mapped[-1]):
            self._mapped.append(map_file(self.folder, max(tensor.nbytes, BLOCK)))
            self._used = 0
        place = torch.frombuffer(self._mapped[-1], dtype=torch.uint8, count=tensor.nbytes, offset=self._used)
        self._used += -(-tensor.nbytes // 64) * 64  # aligned, as torch does
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def unmap_pages(self) -> None:
        """Let go of the pages of all copies; their content stays."""
        for mapped in self._mapped:
            unmap_pages(mapped)


def resident_in_files() -> int:
    """Bytes of this process's memory that are pages of files."""
    return int(STATISTICS.read_bytes().split()[2]) * mmap.PAGESIZE


def map_file(folder: Path, size: int) -> mmap.mmap:
    """A memory-mapped file without a name, whose space is reserved: writing to it cannot fail later.

    Raises:
        OSError: no room on the disk.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            reserve = getattr(os, "posix_fallocate", lambda file, start, length: os.truncate(file, length))
            reserve(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                f"no room for {size / 2**30:.2f} GiB of working files in {folder} ({error.strerror}); free some, "
                "choose an output folder on another disk, or raise max_memory"
            ) from error
        return mmap.mmap(file.fileno(), size)


def unmap_pages(mapped: mmap.mmap) -> None:
    """Let go of a file's pages, where the system can; they come back when they are used."""
    if hasattr(mmap, "MADV_DONTNEED"):  # of a file that is shared, this loses nothing
        mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_workspace(folder: Path | None, resident: int, max_elements: int) -> Iterator[Workspace]:
    """The workspace of a run, for as long as the context is open.

    Args:
        folder: for files of what is as large as a layer's experts; None where that stays in memory.
        resident: bytes of these files' pages that may be in memory at once.
        max_elements: numbers of each other kind that a step may hold.
    """
    if folder is None:
        yield Workspace(max_elements=max_elements)
        return
    scratch = Scratch(folder)
    with scratch.bounded(resident):
        yield Workspace(scratch.empty, max_elements)
