"""Load a checkpoint whole, in the class that its config names."""

from pathlib import Path
from typing import Any


__all__ = ["load_model", "model_class"]


def load_model(model: str | Path, device: str | None = None, dtype: Any = None, **source: Any) -> Any:
    """A model ready to run: in evaluation mode, on one device.

    Args:
        model: folder or Hub id.
        device: CUDA where there is one by default.
        dtype: a `torch.dtype` or its name; as stored by default.
        **source: `revision`, `token` and `trust_remote_code`.
    """
    import torch

    from .dtype import parse_dtype

    dtype = parse_dtype(dtype) or "auto"
    loaded = model_class(model, **source).from_pretrained(model, dtype=dtype, **source)
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def model_class(model: str | Path, **source: Any) -> type:
    """The class that a checkpoint's config names; `AutoModelForCausalLM` where transformers does not have it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, **source)
    return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
