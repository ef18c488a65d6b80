"""Checks of token ids, attention masks and batches that somebody else has made."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


__all__ = ["check_batches", "check_masks", "checked_ids", "checked_mask"]


def check_batches(batches: Any, vocabulary: int, masked: bool = False) -> None:
    """Refuse batches that a model cannot run.

    Args:
        batches: a list of dicts of `input_ids` and perhaps `attention_mask`, each (batch, sequence).
        vocabulary: number of the model's tokens.
        masked: whether masks are needed.

    Raises:
        TypeError: something else is given.
        ValueError: a token that the model does not have, or a mask that is none, as in `checked_mask`.
    """
    if not isinstance(batches, list | tuple):
        raise TypeError(f"batches are a {type(batches).__name__}; give a list of dicts of input_ids")
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"a batch is {batch!r:.80}; give a dict of input_ids (batch, sequence)")
        if masked and not isinstance(batch.get("attention_mask"), Tensor):
            raise TypeError(f"a batch of {', '.join(batch)} has no attention_mask; give one, as load_batches does")
        if not ids.numel():
            raise ValueError("a batch holds no token; leave it out")
        least, most = (int(number) for number in ids.aminmax())
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"a batch has token {least if least < 0 else most}, but the model's vocabulary has {vocabulary} "
                "entries; give the tokenizer that belongs to the model"
            )
    check_masks(batches)


def check_masks(batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Check the attention masks of batches made by the caller, as in `checked_mask`."""
    for batch in batches:
        if "attention_mask" in batch:
            checked_mask(batch["attention_mask"], batch["input_ids"])


def checked_ids(ids: Any) -> Tensor:
    """Convert token ids to a vector.

    Args:
        ids: as a list, array or tensor of whole numbers.

    Returns:
        (S,) int64 on the CPU.

    Raises:
        ValueError: they are something else, such as fractions, which would be cut off.
    """
    found = _as_tensor(ids, "input_ids")
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise ValueError(f"input_ids hold {str(found.dtype).removeprefix('torch.')} numbers; give whole numbers")
    return found.flatten().long()


def _as_tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # no numbers, rows of several lengths, a number too large
        raise ValueError(f"{name} hold {values!r:.80}, which are no numbers ({error}); give whole numbers") from error


def checked_mask(mask: Any, ids: Tensor) -> Tensor:
    """Convert an attention mask to a vector of zeros and ones, one entry per token.

    Args:
        mask: as a list, array or tensor.
        ids: the S token ids that it belongs to.

    Returns:
        (S,) of zeros and ones on the CPU, 1 for real tokens.

    Raises:
        ValueError: another shape, or other numbers, such as indices of samples packed into one row.
    """
    mask = _as_tensor(mask, "attention_mask")
    if mask.numel() != ids.numel():
        raise ValueError(
            f"an attention_mask of shape {tuple(mask.shape)} stands beside {ids.numel()} tokens; give one number a "
            "token, 1 for a real one and 0 for padding"
        )
    mask = mask.flatten()
    others = mask[(mask != 0) & (mask != 1)]
    if len(others):
        raise ValueError(
            f"an attention_mask holds {others[0].item()}, but it must hold 1 for real tokens and 0 for padding; where "
            "its numbers tell packed samples apart, give each sample as a row of its own"
        )
    return mask
