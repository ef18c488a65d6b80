"""Callback for transformers' `Trainer` that logs loss, and KL divergence from the original model, in training.

    cache = cache_logits(original, texts, "predictions")  # before the model is compressed in place
    trainer.add_callback(DernEvaluationCallback(trainer, cache))

A loss alone does not say how close a model is to the original: healing on one domain lowers the loss there, and may
move the model away from the original elsewhere.
"""

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

from ..evaluation.agreement.logits_cache import LogitsCache
from ..evaluation.agreement.measure import Agreement, agreement
from ..evaluation.loss.metrics import perplexity_of


__all__ = ["DernEvaluationCallback"]

PREFIX = "eval_dern_"


class DernEvaluationCallback(TrainerCallback):
    """Callback that logs loss, perplexity and agreement with the original model whenever a `Trainer` evaluates.

    The values go to the trainer's log and to the result of `evaluate`: `eval_dern_loss`, `eval_dern_perplexity`,
    `eval_dern_kl` (nats per token, an unbiased estimate) and `eval_dern_top1`, means over the predicted tokens of all
    texts; with several texts also the values of each, such as `eval_dern_books_kl`.  `metric_for_best_model` may name
    any of them.  Every process measures all texts, so that none waits for another; the model does not change.

    Args:
        trainer: to which the callback is added.
        cache: the original's predictions, from `evaluation.agreement.logits_cache.cache_logits`.
    """

    def __init__(self, trainer: Trainer, cache: LogitsCache) -> None:
        self.trainer, self.cache = trainer, cache

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **options: Any
    ) -> None:
        """Measure the trainer's model, log the values, and add them to the metrics of this evaluation."""
        values = {f"{PREFIX}{name}": value for name, value in self.measure().items()}
        self.trainer.log(dict(values))  # reporters write on the first process only
        if metrics is not None:
            metrics.update(values)

    def measure(self) -> dict[str, float]:
        """Measure the trainer's model as it is now; returns the values by name, without the prefix."""
        found = agreement(self.trainer.model, self.cache)
        tokens = sum(result.tokens for result in found.values())

        def mean(value: Callable[[Agreement], float]) -> float:
            return sum(value(result) * result.tokens for result in found.values()) / tokens

        values = self._named("", mean(_loss), mean(lambda r: r.kl.value), mean(lambda r: r.top1.value))
        if len(found) > 1:
            for name, result in found.items():
                values |= self._named(f"{name}_", _loss(result), result.kl.value, result.top1.value)
        return values

    @staticmethod
    def _named(prefix: str, loss: float, kl: float, top1: float) -> dict[str, float]:
        values = {"loss": loss, "perplexity": perplexity_of(loss), "kl": kl, "top1": top1}
        return {f"{prefix}{name}": value for name, value in values.items()}


def _loss(result: Agreement) -> float:
    return result.original_loss.value + result.loss_increase.value
