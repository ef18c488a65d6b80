"""Teachers of router distillation: the original model in memory, or its cached predictions on disk.

The divergence of a student q from its teacher p at one position is KL(p || q); with cached predictions its lower bound
`kl_at_least` of `evaluation.agreement.measure`, which takes all tokens that are not cached as one.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ..evaluation.agreement.logits_cache import LogitsCache, predicted_positions
from ..machine.torch_state import evaluation_mode


__all__ = ["CachedTeacher", "ModelTeacher", "cached_rows"]

SMALLEST = ("ids", "log_probs", "tail")  # the tensors of a cache that the divergence needs


class ModelTeacher:
    """Teacher that runs the original model, on any device, quantised or not.

    Args:
        model: the original.
        temperature: divides the logits of both models; the divergence is multiplied by its square.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    def divergence(self, student: Tensor, batch: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
        """Compute a student's divergence from the model's predictions, summed over the predicted tokens, in nats.

        Args:
            student: logits (batch, sequence, vocabulary); gradients flow into them only.
            batch: arguments of the model, `input_ids` among them.
            predicted: (batch, sequence - 1) bool, whether the token after each position counts.

        Raises:
            ValueError: the two models have different vocabularies.
        """
        with torch.no_grad(), evaluation_mode(self.model):
            inputs = {name: value.to(self.model.device) for name, value in batch.items()}
            teacher = self.model(**inputs, use_cache=False).logits
        _check_vocabulary(student.shape[-1], teacher.shape[-1])
        total = student.new_zeros((), dtype=torch.float32)
        for own, target, counts in zip(student[:, :-1], teacher[:, :-1], predicted, strict=True):  # large in float32
            target = log_softmax(target.to(own.device)[counts].float() / self.temperature, dim=-1)  # (tokens, V)
            own = log_softmax(own[counts].float() / self.temperature, dim=-1)
            total = total + kl_div(own, target, reduction="sum", log_target=True)
        return self.temperature**2 * total


class CachedTeacher:
    """Teacher that reads the original model's predictions from a cache, looked up by the tokens of a sequence.

    Args:
        cache: from `evaluation.agreement.logits_cache.cache_logits`, of the sequences to train on.
    """

    def __init__(self, cache: LogitsCache) -> None:
        self.cache = cache
        self.places: dict[bytes, tuple[Path, int, int]] = {}  # file, and the range of positions in it
        for path in sorted(cache.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                ids, mask = file.get_tensor("input_ids"), file.get_tensor("attention_mask")
            end = 0
            for row, real, length in zip(ids, mask.bool(), predicted_positions(mask).sum(1).tolist(), strict=True):
                self.places[_fingerprint(row[real])] = (path, end, end + length)
                end += length

    def divergence(self, student: Tensor, batch: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
        """Compute a student's divergence from the cached predictions; arguments as of `ModelTeacher.divergence`.

        Raises:
            ValueError: a sequence is not in the cache, or the student has another vocabulary.
        """
        _check_vocabulary(student.shape[-1], self.cache.vocabulary)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        cached = predicted_positions(mask)
        total = student.new_zeros((), dtype=torch.float32)
        for i, logits in enumerate(student[:, :-1]):
            stored = self._stored(batch["input_ids"][i][mask[i].bool()])
            kept = predicted[i][cached[i]]  # those of the cached positions that count
            stored = {name: value.to(logits.device)[kept.to(logits.device)] for name, value in stored.items()}
            own = log_softmax(logits[cached[i] & predicted[i]].float(), dim=-1)  # (tokens, V)
            total = total + self._from_stored(own, stored)
        return total

    def _from_stored(self, own: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        ids, top, tail = stored["ids"].long(), stored["log_probs"], stored["tail"]
        total = (top.exp() * (top - own.gather(1, ids))).sum()
        if self.cache.top_k == self.cache.vocabulary:
            return total
        rest = own.scatter(1, ids, -torch.inf).logsumexp(1)
        mass = tail.exp()
        return total + torch.where(mass > 0, mass * (tail - rest), 0).sum()

    def _stored(self, tokens: Tensor) -> dict[str, Tensor]:
        """Read the cached predictions for one sequence."""
        place = self.places.get(_fingerprint(tokens))
        if place is None:
            raise ValueError(
                f"a sequence of {len(tokens)} tokens that starts with {tokens[:5].tolist()} is not in the cache "
                f"{self.cache.folder}; train on `cached_rows` of it, or cache the predictions for these sequences"
            )
        path, start, end = place
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name)[start:end] for name in SMALLEST}


def cached_rows(cache: LogitsCache) -> list[dict[str, list[int]]]:
    """List the sequences of a cache, without padding, as rows of a training set."""
    return [
        {"input_ids": row[mask.bool()].tolist()}
        for text in cache.texts
        for batch in cache.inputs(text)
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def _fingerprint(tokens: Tensor) -> bytes:
    return hashlib.blake2b(tokens.long().cpu().numpy().tobytes(), digest_size=16).digest()


def _check_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(f"the model predicts {student} tokens and its teacher {teacher}; give the model's original")
