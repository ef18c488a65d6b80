"""How far a model in training is from the original: a callback for transformers' `Trainer`.

    cache = cache_logits(original, texts, "predictions")  # before the compression, in place
    trainer.add_callback(DernEvaluationCallback(trainer, cache))

A loss says how well a model predicts a text, not whether it still is the model that was compressed: healing on one
domain lowers the loss there and may drift away from the original elsewhere.  So the divergence from the original, and
the share of tokens for which both have the same first choice, stand beside it.
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
    """Whenever a `Trainer` evaluates, log loss and perplexity on some texts, and the distance from the original.

    The values go to the trainer's log and to what `evaluate` returns: `eval_dern_loss`, `eval_dern_perplexity`,
    `eval_dern_kl` (nats per token, estimated without bias) and `eval_dern_top1`, means over the predicted tokens of
    all texts; of several texts also each one's, such as `eval_dern_books_kl`.  `metric_for_best_model` may name any of
    them.  Every process measures the same, so that none waits for another; nothing of the model changes.

    Args:
        trainer: that the callback is added to.
        cache: the original's predictions, of `evaluation.agreement.logits_cache.cache_logits`.
    """

    def __init__(self, trainer: Trainer, cache: LogitsCache) -> None:
        self.trainer, self.cache = trainer, cache

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **options: Any
    ) -> None:
        """Measure, log, and add to the metrics of this evaluation."""
        values = {f"{PREFIX}{name}": value for name, value in self.measure().items()}
        self.trainer.log(dict(values))  # reporters write on the first process only
        if metrics is not None:
            metrics.update(values)

    def measure(self) -> dict[str, float]:
        """The values of the trainer's model as it is now, by their names without the prefix."""
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
