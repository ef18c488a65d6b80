"""Causal language model metrics for `transformers.Trainer`, weighted by tokens.

    Trainer(model, args, eval_dataset=rows, data_collator=collator, **trainer_metrics())

Two numbers per predicted token are enough: its loss, -log p(token), and its rank, the number of more probable tokens.
They are computed on the logits' device, one sequence at a time, so that an evaluation keeps 12 bytes per token instead
of the logits.  Loss and perplexity are those of `perplexity.evaluate_loss` on the same sequences.  Trainer's own
`eval_loss` can differ: it is a mean of batch means, with the router's auxiliary loss where the model adds it.

Pad on the right: with padding on the left the first token of a text counts as predicted from padding, as it does in
the loss of transformers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...results.estimate import mean_and_error


__all__ = ["IGNORED_LABEL", "perplexity_of", "token_losses_and_ranks", "trainer_metrics"]

IGNORED_LABEL = -100  # of padding and prompts; Trainer pads predictions with it too


def trainer_metrics(top_k: int = 5) -> dict[str, Callable]:
    """Make the two arguments of `Trainer` that compute these metrics.

    They also work with `TrainingArguments(batch_eval_metrics=True)`; after an evaluation that was interrupted in that
    mode, make new ones.

    Args:
        top_k: for the accuracy among this many most probable tokens.

    Returns:
        `preprocess_logits_for_metrics`, and `compute_metrics`, which gives `token_loss` in nats with
        `token_loss_stderr`, `perplexity`, `token_accuracy`, `top5_accuracy` (named after `top_k`) and `tokens`, the
        number of predicted tokens.

    Raises:
        ValueError: `top_k` below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; give at least 1")
    return {"compute_metrics": _compute_metrics(top_k), "preprocess_logits_for_metrics": _preprocess_logits}


@torch.no_grad()
def _preprocess_logits(logits: Tensor | Sequence, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce logits, found among a model's outputs by their shape, to losses and ranks of the tokens."""
    outputs = [logits] if isinstance(logits, Tensor) else list(logits)
    for output in outputs:
        if isinstance(output, Tensor) and output.dim() == 3 and output.shape[:2] == labels.shape:
            return token_losses_and_ranks(output, labels)
    shapes = [tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__ for output in outputs]
    raise ValueError(
        f"no output of the model is logits of shape (batch, sequence, vocabulary) for labels of shape "
        f"{tuple(labels.shape)}, only {shapes}; these metrics are for causal language models"
    )


def token_losses_and_ranks(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss and the rank of every predicted token.

    Args:
        logits: (batch, sequence, vocabulary).
        labels: (batch, sequence), not shifted; position t of the logits predicts label t + 1.

    Returns:
        Losses in nats (float32) and ranks (int64), each (batch, sequence - 1).  Rank 0 is the argmax.  Positions
        whose label is ignored have loss 0 and a rank without meaning.
    """
    losses, ranks = [], []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one at a time: float32 copies are large
        row = row.float()  # (S - 1, V)
        losses.append(cross_entropy(row, targets, ignore_index=IGNORED_LABEL, reduction="none"))
        index = targets.clamp(min=0).unsqueeze(1)
        own = row.gather(1, index)
        before = torch.arange(row.shape[1], device=row.device) < index  # ties go to the lower id, as in argmax
        ranks.append((~(row <= own) | (row == own) & before).sum(1))  # NaN counts as preferred, never as a hit
    return torch.stack(losses), torch.stack(ranks)


def _compute_metrics(top_k: int) -> Callable[..., dict[str, float]]:
    """Make the function of an `EvalPrediction`, whose predictions are losses and ranks, that returns the metrics."""
    rows: list[tuple[float, int, int, int]] = []  # per sequence: sum of losses, tokens, hits, hits among the top k

    def compute_metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        predictions, labels = prediction.predictions, prediction.label_ids
        listed = isinstance(labels, list)  # eval_do_concat_batches=False
        for (losses, ranks), targets in zip(predictions, labels, strict=True) if listed else [(predictions, labels)]:
            rows.extend(_sums(torch.as_tensor(losses), torch.as_tensor(ranks), torch.as_tensor(targets), top_k))
        if not compute_result:
            return {}
        sums, counts, hits, top = zip(*rows, strict=True) if rows else ((), (), (), ())
        rows.clear()
        loss, error = mean_and_error(sums, counts)
        tokens = sum(counts)
        return {
            "token_loss": loss,
            "token_loss_stderr": error,
            "perplexity": perplexity_of(loss),
            "token_accuracy": sum(hits) / tokens,
            f"top{top_k}_accuracy": sum(top) / tokens,
            "tokens": tokens,
        }

    return compute_metrics


def perplexity_of(loss: float) -> float:
    """Compute exp(loss), infinite where it exceeds the range of a float."""
    return math.inf if loss > 709 else math.exp(loss)


def _sums(losses: Tensor, ranks: Tensor, labels: Tensor, top_k: int) -> list[tuple[float, int, int, int]]:
    predicted = labels[:, 1:] != IGNORED_LABEL
    columns = (
        torch.where(predicted, losses.double(), 0).sum(1),
        predicted.sum(1),
        (predicted & (ranks == 0)).sum(1),
        (predicted & (ranks < top_k)).sum(1),
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))
