"""Parsing of dtype names in their usual spellings."""

import torch


__all__ = ["parse_dtype"]

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
ALLOWED = ("float32", "bfloat16", "float16")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Parse a dtype, given as `torch.dtype` or by name, such as "bfloat16", "bf16" or "torch.bfloat16".

    Args:
        dtype: for a model; None or "auto" keeps that of its checkpoint.

    Returns:
        The dtype; None to keep that of the checkpoint.

    Raises:
        ValueError: anything else.
    """
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).strip().lower().removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in ALLOWED:
        raise ValueError(
            f"dtype={dtype!r}, but it must be one of {', '.join(ALLOWED)}, or be left out to keep what is stored"
        )
    return getattr(torch, name)
