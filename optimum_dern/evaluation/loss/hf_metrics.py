"""Token accuracy and perplexity as metrics of the `evaluate` package, without downloads.

`evaluate.load("perplexity")` downloads a script, which loads a model by its id.  These classes are instantiated:

    metric = evaluate.combine([TokenAccuracy(), Perplexity()])
    for batch in batches:
        losses, _ = token_losses_and_ranks(logits, labels)  # of metrics.py
        metric.add_batch(predictions=logits[:, :-1].argmax(-1), references=labels[:, 1:], losses=losses)
    metric.compute()

Inputs must be aligned: the prediction at a position is of the reference at the same position, so shift by one first.
"""

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from ...results.estimate import mean_and_error
from .metrics import IGNORED_LABEL, perplexity_of


__all__ = ["Perplexity", "TokenAccuracy"]

TOKENS, NUMBERS = ListOf(Value("int64")), ListOf(Value("float64"))
REFERENCES = f"references: lists of token ids, one list a sequence; positions with {IGNORED_LABEL} are left out."


class TokenAccuracy(evaluate.Metric):
    """Metric: share of tokens that are the model's most probable token.

    Args:
        **options: of `evaluate.Metric`, for example `keep_in_memory`, `cache_dir` or `experiment_id`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of tokens that are the model's first choice.",
            citation="",
            inputs_description=f"predictions: lists of token ids, as long as the references. {REFERENCES}",
            features=Features({"predictions": TOKENS, "references": TOKENS}),
        )

    def _compute(self, predictions: Sequence, references: Sequence, losses: Any = None) -> dict[str, float]:
        pairs = _pairs(predictions, references, "predictions")  # losses are another metric's, in `evaluate.combine`
        hits = [sum(guess == token for guess, token in row) for row in pairs]
        return {"token_accuracy": mean_and_error(hits, [len(row) for row in pairs])[0]}


class Perplexity(evaluate.Metric):
    """Metric: perplexity and loss over all tokens, with the standard error of the loss.

    Args:
        **options: of `evaluate.Metric`, for example `keep_in_memory`, `cache_dir` or `experiment_id`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean loss over all tokens; the error treats sequences as independent.",
            citation="",
            inputs_description=f"losses: lists of -log p (nats) of each reference, as long as these. {REFERENCES}",
            features=Features({"losses": NUMBERS, "references": TOKENS}),
        )

    def _compute(self, losses: Sequence, references: Sequence) -> dict[str, float]:
        pairs = _pairs(losses, references, "losses")
        sums, counts = [sum(loss for loss, _ in row) for row in pairs], [len(row) for row in pairs]
        loss, error = mean_and_error(sums, counts)
        return {
            "token_loss": loss,
            "token_loss_stderr": error,
            "perplexity": perplexity_of(loss),
            "tokens": sum(counts),
        }


def _pairs(values: Sequence, references: Sequence, name: str) -> list[list[tuple[Any, int]]]:
    """Pair values with references, per sequence, without the positions to ignore."""
    for i, (row, targets) in enumerate(zip(values, references, strict=True)):
        if len(row) != len(targets):
            raise ValueError(
                f"sequence {i} has {len(row)} {name} but {len(targets)} references; shift both, so that each stands "
                "at the position of the reference that it belongs to"
            )
    return [
        [(value, target) for value, target in zip(row, targets, strict=True) if target != IGNORED_LABEL]
        for row, targets in zip(values, references, strict=True)
    ]
