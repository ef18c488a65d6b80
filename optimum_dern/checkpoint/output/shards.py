"""Shards of a checkpoint that is written tensor by tensor, in any order, also by a resumed run.

Names, shapes and dtypes of all tensors are known before the first is computed, so every shard is created with its
header at the start, and each tensor is written to its place when it is ready.  Complete shards are moved at the end.
"""

import errno
import hashlib
import math
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...errors import naming
from ..format.reader import LazyTensor
from ..format.tensor_file import DTYPES, TensorInfo, create_file, read_header, read_tensor, write_bytes
from ..format.weight_files import SINGLE_NAME, write_index


__all__ = ["OutputTensor", "ShardWriter", "check_room", "check_space", "parse_bytes", "plan_shards", "publish_shards"]


class OutputTensor(NamedTuple):
    """Name, dtype and shape of a tensor of the compressed checkpoint."""

    name: str
    dtype: str  # its name in safetensors
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def plan_shards(tensors: Sequence[OutputTensor], max_shard_size: int) -> dict[str, list[OutputTensor]]:
    """Divide tensors over shards, in their order; only a shard with a single tensor may exceed the maximum size.

    Args:
        tensors: of the whole checkpoint.
        max_shard_size: in bytes.

    Returns:
        Tensors by file name.
    """
    files: list[list[OutputTensor]] = [[]]
    room = max_shard_size
    for tensor in tensors:
        if files[-1] and tensor.size > room:
            files.append([])
            room = max_shard_size
        files[-1].append(tensor)
        room -= tensor.size
    if len(files) == 1:
        return {SINGLE_NAME: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}


def check_room(folder: Path, plans: Mapping[Path, Mapping[str, Sequence[OutputTensor]]]) -> None:
    """Refuse shards that are larger than what the disk has left, before the hours that it takes to fill them.

    Args:
        folder: on that disk.
        plans: tensors by file name, by working folder; nothing is refused to a run that has begun to fill them.

    Raises:
        OSError: the disk has too little room.
    """
    if any((work / name).exists() for work, plan in plans.items() for name in plan):
        return
    needed = sum(tensor.size for plan in plans.values() for tensors in plan.values() for tensor in tensors)
    check_space(folder, needed)


def check_space(folder: Path, needed: int) -> None:
    """Refuse weights that are larger than what a disk has left.

    Args:
        folder: on that disk; it need not exist.
        needed: in bytes.

    Raises:
        OSError: the message has both sizes.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        sizes = [f"{size / 2**30:.3g} GiB" for size in (needed, free)]
        raise OSError(errno.ENOSPC, "the weights of the result take {}, and {} are free".format(*sizes), str(folder))


class ShardWriter:
    """Writes tensors to their places in the shards in a working folder.

    Args:
        folder: working folder; shards of an interrupted run there are continued.
        plan: tensors by file name.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Sequence[OutputTensor]]) -> None:
        self.places: dict[str, TensorInfo] = {}
        for name, tensors in plan.items():
            path = folder / name
            if not path.exists():
                create_file(temporary := folder / f".{name}.tmp", tensors)
                os.replace(temporary, path)
            self.places.update(read_header(path))
        self._files = {path: os.open(path, os.O_RDWR) for path in {info.path for info in self.places.values()}}
        self.close = weakref.finalize(self, _close_files, self._files)  # runs once, at the latest on deletion

    def write(self, name: str, tensor: Tensor) -> str:
        """Write one tensor, which is on the CPU and in the dtype of its place.

        Returns:
            SHA-256 of its bytes.
        """
        info, digest = self.places[name], hashlib.sha256()
        one_by_one = tensor.dim() == 3 and not tensor.is_contiguous() and tuple(tensor.shape) == info.shape
        start = info.start
        for part in tensor.split(1) if one_by_one else [tensor]:  # transposed experts are copied
            place = info._replace(shape=tuple(part.shape), start=start) if one_by_one else info
            digest.update(write_bytes(place, self._files[info.path], part))
            start += part.nbytes
        return digest.hexdigest()

    def lazy(self, name: str) -> LazyTensor:
        """Return a written tensor, which is read back when it is used."""
        info = self.places[name]
        return LazyTensor(info, lambda empty: read_tensor(info, self._files[info.path], empty))

    def flush(self) -> None:
        """Wait until everything written is on disk (fsync)."""
        for path, file in self._files.items():
            with naming(path):
                os.fsync(file)


def publish_shards(folder: Path, plan: Mapping[str, Sequence[OutputTensor]], output: Path) -> None:
    """Move finished shards to the output folder, and write their index last.

    Args:
        folder: working folder; some shards may have been moved before an interruption.
        plan: tensors by file name.
        output: folder of the checkpoint.
    """
    for name in plan:
        if (folder / name).exists():
            os.replace(folder / name, output / name)
    if list(plan) != [SINGLE_NAME]:
        names = {tensor.name: name for name, tensors in plan.items() for tensor in tensors}
        write_index(output, names, sum(tensor.size for tensors in plan.values() for tensor in tensors))


def _close_files(files: dict[Path, int]) -> None:
    for file in files.values():
        os.close(file)
    files.clear()


def parse_bytes(size: int | str) -> int:
    """Parse a size in bytes from a number or a text such as "5GB" (powers of ten) or "8GiB" (powers of two).

    Raises:
        ValueError: the value is not a size, or is less than one byte.
    """
    text = str(size).strip().upper()
    number, unit = text.rstrip("KMGTIB"), text[len(text.rstrip("KMGTIB")) :].removesuffix("B")
    factors = {"": 1, **{prefix: 10 ** (3 * i) for i, prefix in enumerate("KMGT", 1)}}
    factors |= {f"{prefix}I": 2 ** (10 * i) for i, prefix in enumerate("KMGT", 1)}
    try:
        value = int(float(number) * factors[unit])
    except (KeyError, OverflowError, ValueError):
        raise ValueError(f'{size!r} is not a size; give bytes, or a text such as "5GB" or "8GiB"') from None
    if value < 1:
        raise ValueError(f"{size!r} is not a size; it must be at least one byte")
    return value
