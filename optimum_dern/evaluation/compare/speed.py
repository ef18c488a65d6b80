"""Time of a prompt's forward pass and of token-by-token decoding, on any causal language model with a cache."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.mode import evaluation_mode


__all__ = ["SpeedSettings", "decode_seconds", "prefill_seconds", "random_prompt"]


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed."""

    batch_size: int = 1
    prompt_length: int = 512  # tokens of the forward pass
    new_tokens: int = 32  # decoded one by one after it
    repeats: int = 5


def random_prompt(settings: SpeedSettings, vocabulary: int, device: torch.device) -> Tensor:
    """Token ids (batch, prompt) that are the same for every model with this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    shape = settings.batch_size, settings.prompt_length
    return torch.randint(vocabulary, shape, generator=generator).to(device)


@torch.no_grad()
def prefill_seconds(model: Any, ids: Tensor) -> float:
    """Seconds from a prompt to its last logits.

    Args:
        model: a causal language model.
        ids: (batch, prompt).
    """
    with evaluation_mode(model):
        started = _now(ids.device)
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return _now(ids.device) - started


@torch.no_grad()
def decode_seconds(model: Any, ids: Tensor, new_tokens: int) -> float:
    """Seconds of greedy decoding, a token of each sequence at a time, the prompt's own forward pass left out.

    Args:
        model: a causal language model that takes and returns a cache of keys and values.
        ids: (batch, prompt).
        new_tokens: steps.
    """
    with evaluation_mode(model):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = "cache" if "cache" in output else "past_key_values"  # its name since transformers 5.24, and before
        started = _now(ids.device)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)  # (B, 1)
            output = model(input_ids=token, **{cache: output[cache]}, use_cache=True)
        return _now(ids.device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run on after the call that started them
    return time.perf_counter()
