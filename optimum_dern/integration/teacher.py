"""What a student model is held to: the original model in memory, or its predictions on disk.

The divergence of a student q from its teacher p at one position is KL(p || q).  Of cached predictions, with the k most
probable tokens K, and P and Q the probabilities outside of K,

    sum_K p log(p / q) + P log(P / Q)

takes all other tokens as one: never more than KL(p || q), and equal to it where k is the vocabulary.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ..evaluation.agreement.logits_cache import LogitsCache, predicted_positions
from ..models.mode import evaluation_mode


__all__ = ["CachedTeacher", "ModelTeacher", "Teacher", "cached_rows"]

SMALLEST = ("ids", "log_probs", "tail")


class Teacher(Protocol):
    """What a student can be held to."""

    def divergence(self, student: Tensor, batch: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
        """Sum over the predicted tokens of the student's divergence, in nats.

        Args:
            student: logits (batch, sequence, vocabulary); gradients flow into them alone.
            batch: arguments of the model, `input_ids` among them.
            predicted: (batch, sequence - 1) bool, whether the token after each position counts.
        """


class ModelTeacher:
    """A model in memory, on any device, quantised or not.

    Args:
        model: the original.
        temperature: by which the logits of both are divided; the divergence is multiplied by its square.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    def divergence(self, student: Tensor, batch: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
        """As in `Teacher`.

        Raises:
            ValueError: models of different vocabularies.
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
    """The predictions of a model that is no longer in memory, found by the tokens of a sequence.

    Args:
        cache: of `evaluation.agreement.logits_cache.cache_logits`, over the sequences to learn from.
    """

    def __init__(self, cache: LogitsCache) -> None:
        self.cache = cache
        self.places: dict[bytes, tuple[Path, int, int]] = {}  # file, and which of its positions
        for file, ids, mask in _files(cache):
            end = 0
            for row, real, length in zip(ids, mask.bool(), predicted_positions(mask).sum(1).tolist(), strict=True):
                self.places[_fingerprint(row[real])] = (file, end, end + length)
                end += length

    def divergence(self, student: Tensor, batch: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
        """As in `Teacher`.

        Raises:
            ValueError: a sequence that is not in the cache, or a student of another vocabulary.
        """
        _check_vocabulary(student.shape[-1], self.cache.vocabulary)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        cached = predicted_positions(mask)
        total = student.new_zeros((), dtype=torch.float32)
        for i, logits in enumerate(student[:, :-1]):
            stored = self._stored(batch["input_ids"][i][mask[i].bool()])
            kept = predicted[i][cached[i]]  # of the cached positions
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
        """What the cache holds of one sequence."""
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
    """The sequences of a cache, without their padding, as rows of a training set."""
    return [
        {"input_ids": row[real].tolist()}
        for _, ids, mask in _files(cache)
        for row, real in zip(ids, mask.bool(), strict=True)
    ]


def _files(cache: LogitsCache):
    """Path, tokens and mask of every batch."""
    for path in sorted(cache.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield path, file.get_tensor("input_ids"), file.get_tensor("attention_mask")


def _fingerprint(tokens: Tensor) -> bytes:
    return hashlib.blake2b(tokens.long().cpu().numpy().tobytes(), digest_size=16).digest()


def _check_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(f"the model predicts {student} tokens and its teacher {teacher}; give the model's original")
