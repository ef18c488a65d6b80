"""Reader that dequantises an FP8 or MXFP4 checkpoint tensor by tensor, as if it were stored in bfloat16."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.layer.workspace import Empty
from .quantisation import check_quantisation, dequantise_fp8, dequantise_mxfp4, without_quantisation
from .reader import CheckpointReader, LazyTensor
from .tensor_file import TensorInfo


__all__ = ["DequantisingReader", "open_reader"]

FP8, FLOATS = ("F8_E4M3", "F8_E5M2"), ("F32", "BF16", "F16", "F8_E8M0", "U8")
BYTES = ("U8",)


class Packed(NamedTuple):
    """A quantised weight, stored as several tensors, with the function that dequantises it."""

    info: TensorInfo  # dtype and shape once it is dequantised
    parts: tuple[str, ...]  # names of the stored tensors
    decode: Callable[..., Tensor]


class DequantisingReader:
    """`CheckpointReader` of a quantised checkpoint: hides its scales and returns its weights in bfloat16.

    Args:
        reader: of the checkpoint as it is stored.

    Raises:
        ValueError: the quantisation is not supported, or its scales do not fit.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        quantisation = check_quantisation(reader.config) or {}
        find = {"fp8": _find_fp8, "mxfp4": _find_mxfp4}[quantisation["quant_method"]]
        self._reader = reader
        self._packed, hidden = find(reader.infos, quantisation)
        plain = {name: info for name, info in reader.infos.items() if name not in hidden}
        self.folder, self.config = reader.folder, without_quantisation(reader.config)
        self.infos = plain | {name: packed.info for name, packed in self._packed.items()}
        self.after_read: Callable[[str, Tensor], None] | None = None

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """The tensors of the files, scales included."""
        return self._reader.stored

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self._reader.bytes

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far."""
        return self._reader.bytes_read

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return self._reader.largest_file

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor that is read when it is used."""
        return LazyTensor(self.infos[name], lambda empty: self.read(name, empty))

    def read(self, name: str, empty: Empty = torch.empty) -> Tensor:
        """Read a tensor and dequantise it.

        Args:
            name: of the tensor.
            empty: allocates its memory.
        """
        packed = self._packed.get(name)
        if packed is None:
            tensor = self._reader.read(name, empty)
        else:
            tensor = packed.decode(*(self._reader.read(part, empty) for part in packed.parts), empty=empty)
        if self.after_read is not None:
            self.after_read(name, tensor)
        return tensor

    def close(self) -> None:
        """Close all files."""
        self._reader.close()


def open_reader(folder: Path) -> CheckpointReader | DequantisingReader:
    """Open a checkpoint with the reader for its quantisation.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard is missing.
        ValueError: a file is broken, or the quantisation is not supported.
    """
    reader = CheckpointReader(folder)
    return reader if check_quantisation(reader.config) is None else DequantisingReader(reader)


def _find_fp8(infos: Mapping[str, TensorInfo], quantisation: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
    """Find the FP8 weights by name, and the stored tensors to hide, such as scales."""
    packed = {}
    for name, info in infos.items():
        scale_name = f"{name}_scale_inv"
        scale = infos.get(scale_name)
        if scale is None and info.dtype not in FP8:
            continue
        if scale is None or len(info.shape) < 2:
            raise ValueError(f"{name} is {info.dtype} {info.shape}; FP8 asks for a matrix and for {scale_name}")
        block = tuple(quantisation.get("weight_block_size", (128, 128)) or info.shape[-2:])
        grid = tuple(-(-size // step) for size, step in zip(info.shape[-2:], block, strict=True))
        _check(name, info, FP8, info.shape)
        _check(scale_name, scale, FLOATS, scale.shape if _numel(scale.shape) == 1 else (*info.shape[:-2], *grid))
        packed[name] = Packed(_as_bfloat16(info, info.shape), (name, scale_name), partial(dequantise_fp8, block=block))
    return packed, {name for name in infos if name.endswith(("_scale_inv", "activation_scale"))}


def _find_mxfp4(infos: Mapping[str, TensorInfo], _: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
    """Find the MXFP4 weights by name, and the stored tensors to hide, which are blocks and scales."""
    packed, hidden = {}, set()
    for blocks_name, info in infos.items():
        name = blocks_name.removesuffix("_blocks")
        if name == blocks_name:
            continue
        scales_name = f"{name}_scales"
        scales = infos.get(scales_name)
        if scales is None or len(info.shape) != 4:
            raise ValueError(f"{blocks_name} is {info.dtype} {info.shape}; MXFP4 asks for 4 sizes and {scales_name}")
        _check(blocks_name, info, BYTES, info.shape)
        _check(scales_name, scales, BYTES, info.shape[:3])
        experts, out, groups, width = info.shape
        plain = _as_bfloat16(info, (experts, 2 * groups * width, out))
        packed[name] = Packed(plain, (blocks_name, scales_name), dequantise_mxfp4)
        hidden |= {blocks_name, scales_name}
    return packed, hidden


def _check(name: str, info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if info.dtype not in dtypes or info.shape != shape:
        raise ValueError(
            f"{name} is stored as {info.dtype} {info.shape}, but the checkpoint's quantisation asks for "
            f"{' or '.join(dtypes)} {shape}; it is broken, or of a kind that cannot be dequantised yet"
        )


def _as_bfloat16(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return info._replace(dtype="BF16", shape=shape, size=2 * _numel(shape))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
