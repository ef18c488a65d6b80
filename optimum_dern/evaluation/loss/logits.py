"""Logits batch by batch, of a model in memory or of a checkpoint that streams its layers."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks.batches import check_batches
from ...machine.torch_state import evaluation_mode


__all__ = ["batch_logits", "rows_of"]


def rows_of(model: Any) -> int:
    """Return how many tokens a model, or a `StreamedCheckpoint`, has embeddings for."""
    return getattr(model, "skeleton", model).get_input_embeddings().weight.shape[0]


@torch.no_grad()
def batch_logits(model: Any, batches: Sequence[dict], keep: Sequence[int] | None = None) -> Iterator[Tensor]:
    """Compute the logits of every batch, one batch at a time.

    Args:
        model: a causal language model, which runs in evaluation mode and is then set back; or a `StreamedCheckpoint`.
        batches: `input_ids` and `attention_mask`, each (batch, sequence).
        keep: for each batch, how many last positions are needed; models with `logits_to_keep` skip the others.

    Yields:
        (batch, positions, vocabulary), on the model's device; all positions, or at least those to keep.

    Raises:
        ValueError: a mask has other values than 0 and 1, or a token is not in the model's vocabulary.
    """
    check_batches(batches, rows_of(model))
    if hasattr(model, "stream_logits"):
        yield from model.stream_logits(batches)
        return
    can_keep = keep is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
    with evaluation_mode(model):
        for position, batch in enumerate(batches):
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            options = {"logits_to_keep": keep[position]} if can_keep else {}
            yield model(**inputs, use_cache=False, **options).logits
