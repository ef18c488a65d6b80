"""Build a model without weights, on the meta device, from its config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import explained
from .loading import load_config, named_class
from .refusals import check_config


__all__ = ["build_like", "build_skeleton"]

LARGE = 1 << 24  # elements; more than any buffer has
INITIALISERS = ("normal_", "uniform_", "kaiming_uniform_")  # of torch, and what transformers puts in their place


def build_skeleton(
    folder: str | Path,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    dequantised: bool = False,
    stored_dtype: Callable[[], torch.dtype | None] | None = None,
) -> nn.Module:
    """Build a checkpoint's model on the meta device, as the class that its config names.

    `AutoModelForCausalLM` would build only the language model of a checkpoint that has a vision tower too.

    Args:
        folder: of the checkpoint; only its config is read.
        trust_remote_code: run the checkpoint's own modelling code.
        dtype: of the model; by default that of its config.
        stored_dtype: returns the dtype of the checkpoint's tensors; called only if its config has none.
        dequantised: ignore the config's quantisation, because weights are dequantised when they are read.

    Returns:
        The model, without any storage.

    Raises:
        ValueError: a family that cannot be compressed, or a config that no model can be built from.
    """
    import transformers
    from accelerate import init_empty_weights

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_config(folder, **options)
    check_config(config)
    for part in (config, config.get_text_config()) if dequantised else ():
        vars(part).pop("quantization_config", None)
    dtype = dtype or config.dtype or (stored_dtype and stored_dtype()) or config.get_text_config().dtype
    architecture = named_class(config)
    failed = f"transformers cannot build the model that {folder}/config.json describes"
    with explained(failed, "mend it, or download it again"), init_empty_weights(include_buffers=False), LargeOnMeta():
        if architecture is not None and config.model_type == architecture.config_class.model_type:
            skeleton = architecture._from_config(config, dtype=dtype)
        else:
            skeleton = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    skeleton.tie_weights(recompute_mapping=False)  # replacing parameters by empty ones has untied them
    return skeleton.eval()


def build_like(model: nn.Module, config: Any) -> nn.Module:
    """Build a model of the same class from another config, on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), LargeOnMeta():
        return type(model)._from_config(config, dtype=model.dtype)


class LargeOnMeta(TorchFunctionMode):
    """Torch function mode that creates large tensors on the meta device, and draws no values for tensors there.

    accelerate replaces a parameter only after its allocation, which fails where address space is limited.  Drawing
    values that are kept nowhere is most of the time that it takes to build a model.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        kwargs = kwargs or {}
        if function is torch.empty and args:
            shape = args if isinstance(args[0], int) else args[0]
            if torch.Size(shape).numel() >= LARGE:
                kwargs = {**kwargs, "device": "meta"}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(function, "__name__", "") in INITIALISERS and tensor is not None and tensor.is_meta:
            return tensor
        return function(*args, **kwargs)
