"""A model's logits batch by batch, whether it is in memory or streams its layers from a checkpoint."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.batches import check_masks
from ...models.mode import evaluation_mode


__all__ = ["batch_logits"]


@torch.no_grad()
def batch_logits(model: Any, batches: Sequence[dict], keep: Sequence[int] | None = None) -> Iterator[Tensor]:
    """Logits of every batch, one batch at a time.

    Args:
        model: a causal language model in any mode, evaluated without dropout and put back; or a `StreamedCheckpoint`.
        batches: `input_ids` and `attention_mask`, each (batch, sequence).
        keep: of each batch, how many last positions are wanted; a model that can leaves the others out.

    Yields:
        (batch, positions, vocabulary), on the model's device; all positions, or at least those to keep.

    Raises:
        ValueError: a mask of other numbers than 0 and 1.
    """
    check_masks(batches)
    if hasattr(model, "stream_logits"):
        yield from model.stream_logits(batches)
        return
    can_keep = keep is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
    with evaluation_mode(model):
        for position, batch in enumerate(batches):
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            options = {"logits_to_keep": keep[position]} if can_keep else {}
            yield model(**inputs, use_cache=False, **options).logits
