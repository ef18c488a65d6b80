"""A model without weights: its modules on the meta device, from nothing but its config."""

from typing import Any

from torch import nn


__all__ = ["build_skeleton"]


def build_skeleton(model: str, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Build a checkpoint's causal language model on the meta device.

    Args:
        model: local folder or Hub id; only its config is read.
        revision: of a Hub model.
        trust_remote_code: run the checkpoint's own modelling code.

    Returns:
        The model, in the dtype of its config, without any storage.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(model, revision=revision, **options)
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=config.get_text_config().dtype, **options)
    skeleton.tie_weights()  # replacing parameters by empty ones has separated them
    return skeleton
