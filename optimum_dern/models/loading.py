"""Load a whole checkpoint as the model class that its config names, in a dtype given by name."""

from pathlib import Path
from typing import Any

import torch

from ..errors import explained
from ..machine.torch_state import default_device
from .moe.structure import COUNT_KEYS


__all__ = ["load_config", "load_model", "model_class", "named_class", "parse_dtype"]

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
ALLOWED = ("float32", "bfloat16", "float16")
MOST = {  # sizes far above any model's, with which building one takes all memory or does not end
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 17,
    "head_dim": 1 << 20,
    "hidden_size": 1 << 20,
    **dict.fromkeys(COUNT_KEYS, 1 << 16),
}


def load_config(model: str | Path, **source: Any) -> Any:
    """Load a checkpoint's config, which somebody else has written and may hold anything.

    Args:
        model: folder or Hub id.
        **source: `revision`, `token` and `trust_remote_code`.

    Raises:
        ValueError: transformers does not know the family or refuses a value, or a size is beyond any model's.
        OSError: there is none, or it is no JSON.
    """
    import transformers

    with explained(f"the config.json of {model} describes no model", "mend it, or download it again"):
        config = transformers.AutoConfig.from_pretrained(model, **source)
        text = config.get_text_config()
        vars(text)  # which a number in place of a nested config does not have
    for part in (config, text):
        for name, most in MOST.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and not 0 <= value <= most:
                raise ValueError(
                    f"the config.json of {model} has {name}={value}, and models have from 0 to {most:,}; mend it, or "
                    "download it again"
                )
    return config


def named_class(config: Any) -> type | None:
    """Return the model class of transformers that a config names, or None where transformers has no such model."""
    import transformers

    names = config.architectures
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


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

    return named_class(load_config(model, **source)) or transformers.AutoModelForCausalLM


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
