"""Reading and writing of safetensors files one tensor at a time, without mapping the file into memory.

The safetensors library maps whole files, whose pages then count as used memory, and writes a file from tensors that
are all in memory at once.  The format is simple: eight bytes with the header's length, a JSON header, the data.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.layer.workspace import Empty
from ...errors import naming
from ...text_files import parse_object


__all__ = [
    "DTYPES",
    "TensorInfo",
    "create_file",
    "dtype_name",
    "equal_values",
    "read_header",
    "read_tensor",
    "write_bytes",
]

LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
PIECE = 1 << 22  # elements that `equal_values` compares at a time

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
}


class TensorInfo(NamedTuple):
    """A tensor's file, position, dtype and shape, from a safetensors header."""

    path: Path
    dtype: str  # its name in safetensors, such as "BF16"
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    size: int  # in bytes


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file: its tensors by name.

    Raises:
        ValueError: the file is not safetensors, is shorter than its header says, or its header contradicts itself.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < offset <= min(length, LONGEST_HEADER):
            raise ValueError(f"{path.name} is not a safetensors file; download it again")
        header = parse_object(file.read(offset - 8), f"the header of {path.name}")
    header.pop("__metadata__", None)
    infos = {name: _described(path, offset, name, entry) for name, entry in header.items()}
    if any(info.start + info.size > length for info in infos.values()):
        raise ValueError(f"{path.name} is {length} bytes long, shorter than its header says; download it again")
    places = sorted((info.start, info.start + info.size, name) for name, info in infos.items())
    for (_, end, first), (start, _, second) in pairwise(places):
        if start < end:
            raise ValueError(f"{path.name} has {first} and {second} in the same place; download it again")
    return infos


def _described(path: Path, offset: int, name: str, entry: Any) -> TensorInfo:
    """Read one entry of a header that begins at an offset's end; refuses one that makes no sense."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        size = math.prod(shape) * DTYPES[dtype].itemsize if numbers and dtype in DTYPES else end - start
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} does not describe {name}: {str(entry)[:80]}; download it again") from error
    if not numbers or not isinstance(dtype, str) or end - start != size:
        raise ValueError(f"{path.name} contradicts itself about {name}: {str(entry)[:80]}; download it again")
    return TensorInfo(path, dtype, shape, offset + start, end - start)


def read_tensor(info: TensorInfo, file: int, empty: Empty = torch.empty) -> Tensor:
    """Read a tensor from an open file into memory of its own.

    Args:
        info: of the tensor, from `read_header`.
        file: descriptor of `info.path`.
        empty: allocates the memory, aligned as by torch, because alignment can change the last bits of sums.
    """
    data = empty([info.size], dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    while done < info.size:
        count = os.preadv(file, [view[done:]], info.start + done)
        if not count:
            raise OSError(f"{info.path.name} ended in the middle of a tensor; download it again")
        done += count
    return data.view(DTYPES[info.dtype]).view(info.shape)


def equal_values(first: TensorInfo, second: TensorInfo, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are equal after conversion to a dtype; reads piece by piece up to a difference."""
    if first.shape != second.shape:
        return False
    with first.path.open("rb") as one, second.path.open("rb") as other:
        pieces = zip(_pieces(first, one.fileno()), _pieces(second, other.fileno()), strict=True)
        return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in pieces)


def _pieces(info: TensorInfo, file: int) -> Iterator[Tensor]:
    """Yield a tensor's elements, `PIECE` at a time."""
    size = DTYPES[info.dtype].itemsize
    for start in range(0, info.size, PIECE * size):
        length = min(PIECE * size, info.size - start)
        yield read_tensor(info._replace(shape=(length // size,), start=info.start + start, size=length), file)


def create_file(
    path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> None:
    """Create a safetensors file with its header and space for the tensors, which can then be written in any order.

    Args:
        path: of the new file.
        tensors: name, safetensors dtype and shape of each.
        metadata: entries for the header's `__metadata__`.
    """
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-DTYPES[t[1]].itemsize, t[0])):  # keeps all aligned
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_bytes(info: TensorInfo, file: int, tensor: Tensor) -> memoryview:
    """Write a tensor's bytes into its place in a file, and return them.

    Args:
        info: the place, which has the tensor's dtype and shape.
        file: descriptor of `info.path`, open for writing.
        tensor: on the CPU.
    """
    if dtype_name(tensor.dtype) != info.dtype or tuple(tensor.shape) != info.shape:
        raise ValueError(f"a {tensor.dtype} {tuple(tensor.shape)} does not fit the place of {info}")
    data = memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    done = 0
    with naming(info.path):
        while done < len(data):
            done += os.pwrite(file, data[done:], info.start + done)
    return data


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a dtype."""
    return next(name for name, value in DTYPES.items() if value == dtype)
