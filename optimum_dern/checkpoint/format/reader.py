"""Reader of a checkpoint's safetensors files: names, dtypes and shapes from the headers, values tensor by tensor."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ...core.layer.workspace import Empty
from ...text_files import read_object
from .changes import FileStamps
from .quantisation import check_quantisation, find_packed, without_quantisation
from .tensor_file import DTYPES, TensorInfo, read_header, read_tensor
from .weight_files import weight_files


__all__ = ["CheckpointReader", "LazyTensor", "stored_tensors"]

AHEAD = 1 << 30  # most bytes that `announce` asks for: the system's cache shares the memory with us


class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as transformers' loading functions do.

    Args:
        info: its dtype and shape.
        read: reads it, given a function that allocates memory.
        empty: allocates the memory that it is read into.
        plain: it is stored as it is read, not quantised.
    """

    def __init__(
        self, info: TensorInfo, read: Callable[[Empty], Tensor], empty: Empty = torch.empty, plain: bool = True
    ) -> None:
        self.info, self.read, self.empty, self.plain = info, read, empty, plain

    def __getitem__(self, index: object) -> Tensor:
        return self.read(self.empty)[index]

    def into(self, empty: Empty) -> "LazyTensor":
        """Return the same tensor, to be read into memory that another function allocates."""
        return LazyTensor(self.info, self.read, empty, self.plain)

    def read_into_(self, place: Tensor) -> None:
        """Read the tensor into another one of its shape, without a copy where dtype and memory layout allow it."""
        alike = self.plain and place.dtype == DTYPES.get(self.info.dtype) and place.device.type == "cpu"
        if alike and place.is_contiguous():
            self.read(lambda *_, **__: place.flatten().view(torch.uint8))
        else:
            place.copy_(self[...])

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype, by its name in safetensors."""
        return self.info.dtype


class CheckpointReader:
    """Reader of the weights in a folder of safetensors files; quantised ones are read as if stored in bfloat16.

    Args:
        folder: with a config.json and the weight files that `weight_files` finds, all tensors of which count.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard is missing.
        ValueError: a file is broken, the quantisation is not supported, or its scales do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps = FileStamps([folder / "config.json", *weight_files(folder)])
        self.config = read_object(folder / "config.json")
        self.stored = stored_tensors(folder)
        self.infos, self._packed = self.stored, {}
        if quantisation := check_quantisation(self.config):
            self.config = without_quantisation(self.config)
            self._packed, hidden = find_packed(self.stored, quantisation)
            plain = {name: info for name, info in self.stored.items() if name not in hidden}
            self.infos = plain | {name: packed.info for name, packed in self._packed.items()}
        self.bytes_read = 0
        self.after_read: Callable[[str, Tensor], None] | None = None  # called with every tensor that is read
        self._files: dict[Path, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.size for info in self.stored.values())

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return max(path.stat().st_size for path in {info.path for info in self.stored.values()})

    def check_unchanged(self) -> None:
        """Refuse to go on with a checkpoint of which somebody has changed or removed a file since it was opened.

        Raises:
            ValueError: the message names the file.
        """
        self._stamps.check()

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor that is read when it is used."""
        return LazyTensor(self.infos[name], lambda empty: self.read(name, empty), plain=name not in self._packed)

    def part(self, name: str, index: Tensor, dim: int = 0) -> LazyTensor:
        """Return entries (N,) of a tensor along a dimension, read when used: alone if they lie behind one another.

        Args:
            name: of the tensor.
            index: of the entries, in the order wanted.
            dim: the dimension.
        """
        info = self.infos[name]
        shape = (*info.shape[:dim], len(index), *info.shape[dim + 1 :])
        apart = dim == 0 and name not in self._packed and info.dtype in DTYPES

        def read(empty: Empty) -> Tensor:
            if not apart:
                return self.read(name, empty).index_select(dim, index)
            size = info.size // info.shape[0]
            rows = [
                info._replace(shape=info.shape[1:], start=info.start + row * size, size=size) for row in index.tolist()
            ]
            self.bytes_read += size * len(rows)
            return torch.stack([read_tensor(row, self._file(info.path), empty) for row in rows])

        return LazyTensor(info._replace(shape=shape), read, plain=apart)

    def read(self, name: str, empty: Empty = torch.empty) -> Tensor:
        """Read a tensor, and dequantise it where it is quantised.

        Args:
            name: of the tensor.
            empty: allocates its memory.
        """
        packed = self._packed.get(name)
        if packed is None:
            tensor = self._read_stored(name, empty)
        else:
            tensor = packed.decode(*(self._read_stored(part, empty) for part in packed.parts), empty=empty)
        if self.after_read is not None:
            self.after_read(name, tensor)
        return tensor

    def announce(self, names: Iterable[str]) -> None:
        """Have the system read tensors beside our computation, into its own cache; at most the first `AHEAD` bytes.

        Args:
            names: of the tensors that will be read next.
        """
        if not hasattr(os, "posix_fadvise"):  # only Linux has it
            return
        parts = [part for name in names for part in (self._packed[name].parts if name in self._packed else (name,))]
        left = AHEAD
        for info in sorted((self.stored[part] for part in parts), key=lambda info: (info.path, info.start)):
            size = min(info.size, left)
            left -= size
            if size:  # zero would mean the rest of the file
                with suppress(OSError):  # a file system may refuse; reading does not depend on it
                    os.posix_fadvise(self._file(info.path), info.start, size, os.POSIX_FADV_WILLNEED)

    def _read_stored(self, name: str, empty: Empty) -> Tensor:
        info = self.stored[name]
        if info.dtype not in DTYPES:
            raise ValueError(f"{name} has the dtype {info.dtype}, which is not one of {', '.join(DTYPES)}")
        self.bytes_read += info.size
        return read_tensor(info, self._file(info.path), empty)

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._stamps.check_file(path)
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of the files that `weight_files` finds: a checkpoint's tensors as they are stored, by name."""
    return {name: info for path in weight_files(folder) for name, info in read_header(path).items()}
