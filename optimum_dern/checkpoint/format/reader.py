"""Reader of a checkpoint's safetensors files: names, dtypes and shapes from the headers, values tensor by tensor."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...core.layer.workspace import Empty
from .tensor_file import DTYPES, TensorInfo, read_header, read_tensor
from .weight_files import weight_files


__all__ = ["CheckpointReader", "LazyTensor"]


class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as transformers' loading functions do.

    Args:
        info: its dtype and shape.
        read: reads it, given a function that allocates memory.
        empty: allocates the memory that it is read into.
    """

    def __init__(self, info: TensorInfo, read: Callable[[Empty], Tensor], empty: Empty = torch.empty) -> None:
        self.info, self.read, self.empty = info, read, empty

    def __getitem__(self, index: object) -> Tensor:
        return self.read(self.empty)[index]

    def into(self, empty: Empty) -> "LazyTensor":
        """Return the same tensor, to be read into memory that another function allocates."""
        return LazyTensor(self.info, self.read, empty)

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype, by its name in safetensors."""
        return self.info.dtype


class CheckpointReader:
    """Reader of the weights in a folder of safetensors files.

    Args:
        folder: with a config.json and the weight files that `weight_files` finds, all tensors of which count.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard is missing.
        ValueError: a file is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        self.infos: dict[str, TensorInfo] = {}
        for path in weight_files(folder):
            self.infos.update(read_header(path))
        self.bytes_read = 0
        self.after_read: Callable[[str, Tensor], None] | None = None  # called with every tensor that is read
        self._files: dict[Path, int] = {}

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """The tensors in the files; `infos` differs from it for a quantised checkpoint."""
        return self.infos

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size for info in self.infos.values())

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return max(path.stat().st_size for path in {info.path for info in self.infos.values()})

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor that is read when it is used."""
        return LazyTensor(self.infos[name], lambda empty: self.read(name, empty))

    def read(self, name: str, empty: Empty = torch.empty) -> Tensor:
        """Read a tensor as it is stored.

        Args:
            name: of the tensor.
            empty: allocates its memory.
        """
        info = self.infos[name]
        if info.dtype not in DTYPES:
            raise ValueError(f"{name} has the dtype {info.dtype}, which is not one of {', '.join(DTYPES)}")
        if info.path not in self._files:
            self._files[info.path] = os.open(info.path, os.O_RDONLY)
        tensor = read_tensor(info, self._files[info.path], empty)
        self.bytes_read += info.size
        if self.after_read is not None:
            self.after_read(name, tensor)
        return tensor

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()
