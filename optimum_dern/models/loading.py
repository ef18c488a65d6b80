"""Load a whole checkpoint as the model class that its config names."""

from pathlib import Path
from typing import Any


__all__ = ["load_model", "model_class"]


def load_model(model: str | Path, device: str | None = None, dtype: Any = None, **source: Any) -> Any:
    """Load a model in evaluation mode on one device.

    Args:
        model: folder or Hub id.
        device: by default CUDA if available.
        dtype: a `torch.dtype` or its name; by default as stored.
        **source: `revision`, `token` and `trust_remote_code`.
    """
    from ..machine.torch_state import default_device
    from .dtype import parse_dtype

    dtype = parse_dtype(dtype) or "auto"
    loaded = model_class(model, **source).from_pretrained(model, dtype=dtype, **source)
    return loaded.to(default_device(device)).eval()


def model_class(model: str | Path, **source: Any) -> type:
    """Return the model class that a checkpoint's config names, or `AutoModelForCausalLM` if transformers lacks it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, **source)
    return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
