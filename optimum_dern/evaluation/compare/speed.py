"""Timing of a prompt's forward pass and of token-by-token decoding, for any causal language model with a KV cache."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...machine.torch_state import devices_of, evaluation_mode, finish


__all__ = ["SpeedSettings", "decode_seconds", "prefill_seconds", "random_prompt"]


@dataclass(frozen=True)
class SpeedSettings:
    """Batch size, lengths and number of rounds of the timing."""

    batch_size: int = 1
    prompt_length: int = 512  # tokens of the prompt
    new_tokens: int = 32  # decoded one by one after the prompt
    repeats: int = 5  # rounds


def random_prompt(settings: SpeedSettings, vocabulary: int, device: torch.device) -> Tensor:
    """Draw token ids (batch, prompt), the same ones for every model with this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    shape = settings.batch_size, settings.prompt_length
    return torch.randint(vocabulary, shape, generator=generator).to(device)


@torch.no_grad()
def prefill_seconds(model: Any, ids: Tensor) -> float:
    """Measure the seconds of a prompt's forward pass, up to its last logits.

    Args:
        model: a causal language model.
        ids: (batch, prompt).
    """
    with evaluation_mode(model):
        started = _now(model)
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return _now(model) - started


@torch.no_grad()
def decode_seconds(model: Any, ids: Tensor, new_tokens: int) -> float:
    """Measure the seconds of greedy decoding, one token of each sequence at a time, without the prompt's forward pass.

    Args:
        model: a causal language model that takes and returns a KV cache.
        ids: (batch, prompt).
        new_tokens: number of decoding steps.
    """
    with evaluation_mode(model):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = "cache" if "cache" in output else "past_key_values"  # its name since transformers 5.24, and before
        started = _now(model)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)  # (B, 1)
            output = model(input_ids=token, **{cache: output[cache]}, use_cache=True)
        return _now(model) - started


def _now(model: Any) -> float:
    finish(devices_of(model))  # kernels run on after the call that started them
    return time.perf_counter()
