"""Load a whole checkpoint as the model class that its config names, in a dtype given by name."""

from pathlib import Path
from typing import Any

import torch

from ..machine.torch_state import default_device


__all__ = ["load_model", "model_class", "parse_dtype"]

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
ALLOWED = ("float32", "bfloat16", "float16")


def load_model(model: str | Path, device: str | None = None, dtype: Any = None, **source: Any) -> Any:
    """Load a model in evaluation mode on one device.

    Args:
        model: folder or Hub id.
        device: by default a GPU where there is one.
        dtype: a `torch.dtype` or its name; by default as stored.
        **source: `revision`, `token` and `trust_remote_code`.
    """
    dtype = parse_dtype(dtype) or "auto"
    loaded = model_class(model, **source).from_pretrained(model, dtype=dtype, **source)
    return loaded.to(default_device(device)).eval()


def model_class(model: str | Path, **source: Any) -> type:
    """Return the model class that a checkpoint's config names, or `AutoModelForCausalLM` if transformers lacks it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, **source)
    return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)


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
