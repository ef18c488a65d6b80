"""Tensors in memory-mapped files, for layers that do not fit into memory.

Each tensor is an unnamed file: its space is freed with the tensor, and no file is left behind however the process
ends.  The system may write mapped pages to disk and reuse their memory at any time; a background thread unmaps pages
beyond a limit, so that they do not count as resident memory of the process either.
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
INTERVAL = 0.01  # seconds between two checks of the background thread
BLOCK = 64 << 20  # bytes of a file that holds several tensors
STATISTICS = Path("/proc/self/statm")


class Scratch:
    """Allocator of tensors in memory-mapped files of a folder.

    Args:
        folder: on a disk with enough space.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: WeakSet[mmap.mmap] = WeakSet()
        self._lock = threading.Lock()  # the background thread iterates over the tensors while others are created

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Allocate a tensor like `torch.empty`; small tensors and those not on the CPU are in memory.

        Raises:
            OSError: not enough space on the disk.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < SMALL or torch.device(device).type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        mapped = map_file(self.folder, size)
        with self._lock:
            self._mapped.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    def unmap_pages(self) -> None:
        """Unmap the resident pages of all tensors; their content stays in the files and is read again when used."""
        with self._lock:
            present = list(self._mapped)
        for mapped in present:
            unmap_pages(mapped)

    @contextmanager
    def bounded(self, resident: int) -> Iterator[None]:
        """Keep resident pages near a limit in bytes until the context exits, on systems that report them."""
        if not STATISTICS.exists():
            yield
            return
        done, others = threading.Event(), resident_in_files()  # libraries

        def watch() -> None:
            nonlocal others
            while not done.wait(INTERVAL):
                if resident_in_files() - others > resident:
                    self.unmap_pages()
                    others = resident_in_files()  # libraries may have mapped more by now

        thread = threading.Thread(target=watch, name="scratch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class CopiesInFiles:
    """Copies of many tensors in a few memory-mapped files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: list[mmap.mmap] = []
        self._used = 0  # bytes of the last file

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into a memory-mapped file."""
        if not self._mapped or self._used + tensor.nbytes > len(self._mapped[-1]):
            self._mapped.append(map_file(self.folder, max(tensor.nbytes, BLOCK)))
            self._used = 0
        place = torch.frombuffer(self._mapped[-1], dtype=torch.uint8, count=tensor.nbytes, offset=self._used)
        self._used += -(-tensor.nbytes // 64) * 64  # aligned, as torch does
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def unmap_pages(self) -> None:
        """Unmap the resident pages of all copies; their content stays in the files."""
        for mapped in self._mapped:
            unmap_pages(mapped)


def resident_in_files() -> int:
    """Return the bytes of this process's resident memory that are pages of files."""
    return int(STATISTICS.read_bytes().split()[2]) * mmap.PAGESIZE


def map_file(folder: Path, size: int) -> mmap.mmap:
    """Create an unnamed memory-mapped file with reserved disk space, so that later writes cannot fail.

    Raises:
        OSError: not enough space on the disk.
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
    """Unmap the resident pages of a file where the system supports it; they are read again when used."""
    if hasattr(mmap, "MADV_DONTNEED"):  # loses no data of a shared mapping
        mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_workspace(folder: Path | None, resident: int, max_elements: int) -> Iterator[Workspace]:
    """Open the workspace of a run: its allocator and memory limits, until the context exits.

    Args:
        folder: for files of tensors as large as a layer's experts; None to keep them in memory.
        resident: most bytes of these files that may be in memory at once.
        max_elements: most elements of any other temporary tensor of a step.
    """
    if folder is None:
        yield Workspace(max_elements=max_elements)
        return
    scratch = Scratch(folder)
    with scratch.bounded(resident):
        yield Workspace(scratch.empty, max_elements)
