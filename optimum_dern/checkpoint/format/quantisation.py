"""Quantised checkpoints: detection, and dequantisation of FP8 and MXFP4 weights to bfloat16.

FP8 (DeepSeek-V3 and others): a weight W of 8-bit floats and `W_scale_inv`, one factor for each block of rows and
columns, or one for all; the last block of a row or column may be incomplete.  MXFP4 (gpt-oss): `W_blocks`, two 4-bit
floats per byte, and `W_scales`, the exponent of two for each block along a row.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.layer.workspace import Empty
from .tensor_file import TensorInfo


__all__ = ["check_quantisation", "find_packed", "without_quantisation"]

KEYS = ("quantization_config", "compression_config")
FP8, FLOATS = ("F8_E4M3", "F8_E5M2"), ("F32", "BF16", "F16", "F8_E8M0", "U8")
BYTES = ("U8",)


class Packed(NamedTuple):
    """A quantised weight, stored as several tensors, with the function that dequantises it."""

    info: TensorInfo  # dtype and shape once it is dequantised
    parts: tuple[str, ...]  # names of the stored tensors
    decode: Callable[..., Tensor]


def check_quantisation(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a checkpoint's `quantization_config`, and refuse one that cannot be dequantised.

    Args:
        config: its config.json.

    Returns:
        Its `quantization_config`; None where it is not quantised.

    Raises:
        ValueError: the quantisation is not supported.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    found = next((part[key] for part in parts for key in KEYS if part.get(key)), None)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json gives the quantisation {found!r:.80}; it must be an object, or left out")
    bits = [f"{n} bits" for n in (4, 8) if found.get(f"load_in_{n}bit")]
    method = found.get("quant_method") or (f"bitsandbytes, {bits[0]}" if bits else "an unnamed method")
    if method == "mxfp4" and config.get("model_type") != "gpt_oss":
        method = f"mxfp4 as {config.get('model_type')}"  # its layout is defined for gpt-oss only
    if method not in ("fp8", "mxfp4"):
        raise ValueError(
            f"the checkpoint is quantised ({method}), and its experts cannot be merged as they are; only fp8 "
            "(DeepSeek-V3's and its kin) and mxfp4 (gpt-oss) are dequantised while they are read. Compress the "
            "unquantised checkpoint that it was made from, then quantise the result"
        )
    block = found.get("weight_block_size")
    pair = isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if block is not None and not pair:
        raise ValueError(f"config.json gives weight_block_size {block}; it must be two positive numbers, or null")
    return dict(found)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without its quantisation entries."""
    return {
        key: {k: v for k, v in value.items() if k not in KEYS} if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in KEYS
    }


def find_packed(
    infos: Mapping[str, TensorInfo], quantisation: Mapping[str, Any]
) -> tuple[dict[str, Packed], set[str]]:
    """Find the quantised weights of a checkpoint.

    Args:
        infos: the tensors in its files.
        quantisation: from `check_quantisation`.

    Returns:
        The weights by name, and the names of the stored tensors that only serve them, such as scales.

    Raises:
        ValueError: the scales do not fit.
    """
    return (_find_fp8 if quantisation["quant_method"] == "fp8" else _find_mxfp4)(infos, quantisation)


def _find_fp8(infos: Mapping[str, TensorInfo], quantisation: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
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
        _check(scale_name, scale, FLOATS, scale.shape if math.prod(scale.shape) == 1 else (*info.shape[:-2], *grid))
        decode = partial(_dequantise_fp8, block=block)
        packed[name] = Packed(_as_bfloat16(info, info.shape), (name, scale_name), decode)
    return packed, {name for name in infos if name.endswith(("_scale_inv", "activation_scale"))}


def _find_mxfp4(infos: Mapping[str, TensorInfo], _: Mapping[str, Any]) -> tuple[dict[str, Packed], set[str]]:
    packed = {}
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
        packed[name] = Packed(plain, (blocks_name, scales_name), _dequantise_mxfp4)
    return packed, {part for weight in packed.values() for part in weight.parts}


def _check(name: str, info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if info.dtype not in dtypes or info.shape != shape:
        raise ValueError(
            f"{name} is stored as {info.dtype} {info.shape}, but the checkpoint's quantisation asks for "
            f"{' or '.join(dtypes)} {shape}; it is broken, or of a kind that cannot be dequantised yet"
        )


def _as_bfloat16(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return info._replace(dtype="BF16", shape=shape, size=2 * math.prod(shape))


def _dequantise_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int], empty: Empty = torch.empty) -> Tensor:
    """Dequantise (..., rows, columns) by (..., row blocks, column blocks), or one number; rounded once."""
    if scale.numel() > 1 and weight.dim() > 2:  # fused experts one by one, as float32 takes four times the space
        result = empty(weight.shape, dtype=torch.bfloat16)
        for part, (w, s) in enumerate(zip(weight, scale, strict=True)):
            result[part] = _dequantise_fp8(w, s, block)
        return result
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()  # bytes are exponents
    if factor.numel() == 1:
        return (weight.float() * factor.reshape(())).bfloat16()
    rows, columns = weight.shape
    factor = factor.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * factor).bfloat16()


def _dequantise_mxfp4(blocks: Tensor, scales: Tensor, empty: Empty = torch.empty) -> Tensor:
    """Dequantise blocks (experts, out, G, B) by scales (experts, out, G) to (experts, in = 2 G B, out)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, out, groups, width = blocks.shape
    result = empty((experts, 2 * groups * width, out), dtype=torch.bfloat16)
    for expert in range(experts):  # temporary indices take eight times the memory of the packed weights
        one = slice(expert, expert + 1)
        result[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=torch.bfloat16)
    return result
