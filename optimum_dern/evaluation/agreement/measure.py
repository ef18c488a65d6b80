"""KL divergence and top-token agreement of a compressed model with the original, from its cached predictions.

The original's predictions are read from a `LogitsCache`: its k most probable tokens K, and samples of the others.
With p the original, q the compressed model, P and Q their probabilities outside of K, at every position

    kl           = sum_K p log(p / q) + P mean_samples log(p / q)   unbiased for every k
    kl_at_least  = sum_K p log(p / q) + P log(P / Q)                 <= KL(p || q): all other tokens taken as one

The noise of the samples is part of the standard error.  Both are exact where k is the size of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...results.estimate import Estimate, mean_and_error
from ..loss.logits import batch_logits
from .logits_cache import INPUTS, LogitsCache, predicted_positions


__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True)
class Agreement:
    """Agreement with the original model on one text; standard errors treat sequences as independent."""

    kl: Estimate  # nats per token
    kl_at_least: float  # lower bound of kl, mean over tokens
    top1: Estimate  # share of positions with the same most probable token
    original_loss: Estimate  # nats per token
    loss_increase: Estimate  # over it; a paired difference, whose error is smaller than that of two separate losses
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON."""
        parts = {name: getattr(self, name).to_dict() for name in ("kl", "top1", "original_loss", "loss_increase")}
        return parts | {"kl_at_least": self.kl_at_least, "tokens": self.tokens}


def agreement(model: Any, cache: LogitsCache) -> dict[str, Agreement]:
    """Compare a model with the one whose predictions are cached.

    Args:
        model: a causal language model, or a `StreamedCheckpoint`; it runs on the tokens in the cache.
        cache: from `cache_logits`.

    Returns:
        Agreement by name of the text.

    Raises:
        ValueError: the model has another vocabulary.
    """
    inputs = [batch for name in cache.texts for batch in cache.inputs(name)]
    stored = ((name, tensors) for name in cache.texts for tensors in cache.batches(name))  # one at a time
    rows: dict[str, list[Tensor]] = {name: [] for name in cache.texts}
    for logits, (name, tensors) in zip(batch_logits(model, inputs), stored, strict=True):
        if logits.shape[-1] != cache.vocabulary:
            raise ValueError(
                f"the model predicts {logits.shape[-1]} tokens and the original {cache.vocabulary}; only models with "
                "one vocabulary can be compared"
            )
        rows[name].append(_compare_batch(logits, tensors, cache.top_k == cache.vocabulary))
    return {name: _summarised(torch.cat(parts)) for name, parts in rows.items()}


def _summarised(rows: Tensor) -> Agreement:
    """Compute the means over tokens from sums per sequence, (sequences, 6) as `_compare_batch` lists them."""
    *columns, counts = rows.T.tolist()
    kl, bound, top1, loss, increase = (Estimate(*mean_and_error(sums, counts)) for sums in columns)
    return Agreement(kl, bound.value, top1, loss, increase, int(sum(counts)))


@torch.no_grad()
def _compare_batch(logits: Tensor, stored: dict[str, Tensor], exact: bool) -> Tensor:
    """Compute the sums per sequence of what `_compare_positions` lists, and their number, (batch, 6) float64."""
    predicts = predicted_positions(stored["attention_mask"])  # (B, S - 1)
    counts = predicts.sum(1).tolist()
    parts = {name: value.split(counts) for name, value in stored.items() if name not in INPUTS}
    rows = []
    for i, count in enumerate(counts):
        chosen = predicts[i].to(logits.device)
        logs = logits[i, :-1][chosen].float().log_softmax(-1)  # (T, V); one sequence at a time
        targets = stored["input_ids"][i, 1:][predicts[i]].to(logits.device)
        original = {name: part[i].to(logits.device) for name, part in parts.items()}
        values = _compare_positions(logs, targets, original, exact)
        rows.append(torch.cat([values.double().sum(1).cpu(), torch.tensor([count], dtype=torch.float64)]))
    return torch.stack(rows)


def _compare_positions(logs: Tensor, targets: Tensor, original: dict[str, Tensor], exact: bool) -> Tensor:
    """Compute kl, its lower bound, equal top token, the original's loss and its increase per position, (5, T)."""

    def ratio(ids: str, log_p: str) -> Tensor:
        return original[log_p] - logs.gather(1, original[ids].long())

    top = (original["log_probs"].exp() * ratio("ids", "log_probs")).sum(1)
    kl = bound = top
    if not exact:
        mass = original["tail"].exp()
        rest = logs.scatter(1, original["ids"].long(), -torch.inf).logsumexp(1)
        kl = top + mass * ratio("sample_ids", "sample_log_probs").mean(1)
        bound = top + torch.where(mass > 0, mass * (original["tail"] - rest), 0)
    same = (logs.argmax(1) == original["best"]).float()
    increase = -logs.gather(1, targets.unsqueeze(1)).squeeze(1) - original["losses"]
    return torch.stack([kl, bound, same, original["losses"], increase])
