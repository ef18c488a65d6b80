"""Distillation: train a compressed model on the original's next-token distribution, as a `Trainer` of transformers.

    L = tau^2 / |T| sum over the predicted tokens t of KL(softmax(z_t / tau) || softmax(z'_t / tau))

with the original's logits z_t and the compressed model's z'_t.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..evaluation.agreement.logits_cache import LogitsCache, predicted_positions
from ..evaluation.loss.metrics import IGNORED_LABEL
from .teacher import CachedTeacher, ModelTeacher


__all__ = ["DistillationTrainer"]


class DistillationTrainer(Trainer):
    """A `Trainer` that trains a model towards its original's next-token distribution.

    `eval_loss` is the divergence, too.  Rows need no labels; where they have some, tokens with ignored labels are left
    out.

    Args:
        model: the compressed model.
        args: of transformers' `Trainer`.
        teacher: the original model, on any device and quantised or not; or a `LogitsCache` of its predictions for the
            sequences to train and evaluate on, so that the two never need to be in memory together.
        temperature: tau; must be 1 with a cache.
        **options: of transformers' `Trainer`.

    Raises:
        ValueError: the temperature is invalid; in training, the teacher has another vocabulary, or the cache lacks a
            sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        teacher: nn.Module | LogitsCache,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        self.teacher = _teacher(teacher, temperature)
        super().__init__(model, args, **options)
        self.model_accepts_loss_kwargs = False  # each micro-batch's loss is a mean of its own

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the mean divergence from the teacher on a batch."""
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        outputs, predicted = model(**batch, use_cache=False), _predicted(inputs)
        loss = self.teacher.divergence(outputs.logits, batch, predicted) / predicted.sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights to resume from; `Trainer` itself skips experts, which a checkpoint has one by one."""
        model = self.model if model is None else model
        if not (Path(resume_from_checkpoint) / "config.json").is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        loaded = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())


def _teacher(source: nn.Module | LogitsCache, temperature: float) -> CachedTeacher | ModelTeacher:
    """Make a teacher from a model or a cache of its predictions; refuses invalid temperatures."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}, but it must be finite and above 0; the paper's is 1")
    if not isinstance(source, LogitsCache):
        return ModelTeacher(source, temperature)
    if temperature != 1:
        raise ValueError(f"temperature={temperature!r}, but predictions are cached at temperature 1; leave it out")
    return CachedTeacher(source)


def _predicted(inputs: Mapping[str, Tensor]) -> Tensor:
    """Mark positions (batch, sequence - 1) whose next token counts, by the attention mask and by labels if given."""
    mask = inputs.get("attention_mask")
    predicted = predicted_positions(torch.ones_like(inputs["input_ids"]) if mask is None else mask)
    labels = inputs.get("labels")
    return predicted if labels is None else predicted & (labels[:, 1:] != IGNORED_LABEL)
