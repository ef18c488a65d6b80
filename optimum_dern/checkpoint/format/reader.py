"""Read a checkpoint tensor by tensor: which exist, what they look like, and their values when somebody asks."""

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
    """A tensor of a checkpoint that is read when it is indexed, as transformers' loading does.

    Args:
        info: what it looks like.
        read: reads it.
        empty: makes the tensor that it is read into.
    """

    def __init__(self, info: TensorInfo, read: Callable[[Empty], Tensor], empty: Empty = torch.empty) -> None:
        self.info, self.read, self.empty = info, read, empty

    def __getitem__(self, index: object) -> Tensor:
        return self.read(self.empty)[index]

    def into(self, empty: Empty) -> "LazyTensor":
        """The same tensor, to be read into another one."""
        return LazyTensor(self.info, self.read, empty)

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype, by the format's name."""
        return self.info.dtype


class CheckpointReader:
    """A folder of safetensors files.

    Args:
        folder: with a config and the files that `weight_files` finds; of those that an index names, all tensors.

    Raises:
        FileNotFoundError: no safetensors, or a shard that is missing.
        ValueError: a broken file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        self.infos: dict[str, TensorInfo] = {}
        for path in weight_files(folder):
            self.infos.update(read_header(path))
        self.bytes_read = 0
        self.after_read: Callable[[str, Tensor], None] | None = None  # sees every tensor that is read
        self._files: dict[Path, int] = {}

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """The tensors of the files; `infos` differs from it where they are dequantised as they are read."""
        return self.infos

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(info.size for info in self.infos.values())

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return max(path.stat().st_size for path in {info.path for info in self.infos.values()})

    def lazy(self, name: str) -> LazyTensor:
        """A tensor that is read once it is used."""
        return LazyTensor(self.infos[name], lambda empty: self.read(name, empty))

    def read(self, name: str, empty: Empty = torch.empty) -> Tensor:
        """A tensor as it is stored.

        Args:
            name: of the tensor.
            empty: makes it.
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
