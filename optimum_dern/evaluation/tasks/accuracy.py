"""Accuracy of a model on tasks, computed from the log-likelihoods of the choices.

    acc        the right choice has the largest log-likelihood
    acc_norm   ... the largest log-likelihood per character of the choice (lm-eval's definition)
    acc_bytes  ... per UTF-8 byte
    perplexity exp(-mean log-likelihood), of last words

Ties go to the first choice, as in lm-eval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...results.estimate import Estimate, mean_estimate, perplexity_estimate
from .items import Item
from .load import Task
from .scoring import BATCH_TOKENS, Score, score_requests


__all__ = ["Outcome", "TaskResult", "evaluate_tasks", "make_result", "summarise_outcomes"]

NORMALISED = ("arc_challenge", "hellaswag", "openbookqa", "piqa")  # papers report acc_norm for these, acc elsewhere


@dataclass(frozen=True)
class Outcome:
    """A model's result on one item of a task."""

    id: str
    log_likelihoods: tuple[float, ...]  # one per choice
    metrics: dict[str, float]  # 1 or 0


@dataclass(frozen=True)
class TaskResult:
    """A model's metrics on one task, and its result on every item."""

    name: str
    kind: str
    metrics: dict[str, Estimate]
    chance: float  # accuracy of random guessing
    outcomes: tuple[Outcome, ...]

    @property
    def main_metric(self) -> str:
        """The metric that papers report for this task."""
        return "acc_norm" if self.name in NORMALISED and "acc_norm" in self.metrics else "acc"

    @property
    def main(self) -> Estimate:
        return self.metrics[self.main_metric]

    def values(self) -> list[float]:
        """Return the main metric of every item, in the task's order, for paired comparisons."""
        return [outcome.metrics[self.main_metric] for outcome in self.outcomes]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON, without the items."""
        metrics = {name: estimate.to_dict() for name, estimate in self.metrics.items()}
        facts = {"kind": self.kind, "items": len(self.outcomes), "chance": self.chance}
        return facts | {"main_metric": self.main_metric, "metrics": metrics}


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[Task], batch_tokens: int = BATCH_TOKENS
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks.

    Args:
        model: a causal language model, or a `StreamedCheckpoint`, which is read once for all tasks.
        tokenizer: of the model.
        tasks: from `load_tasks` or `make_task`.
        batch_tokens: tokens of a forward pass, including padding.

    Returns:
        Results by the tasks' names.
    """
    requests = [request for task in tasks for item in task.items for request in item.requests]
    scores = iter(score_requests(model, tokenizer, requests, batch_tokens))
    results = {}
    for task in tasks:
        results[task.name] = make_result(task, [[next(scores) for _ in item.requests] for item in task.items])
    return results


def make_result(task: Task, scores: Sequence[Sequence[Score]]) -> TaskResult:
    """Compute a task's result from the scores of every item's requests."""
    return summarise_outcomes(
        task, [_outcome(item, row, task.kind) for item, row in zip(task.items, scores, strict=True)]
    )


def summarise_outcomes(task: Task, outcomes: Sequence[Outcome]) -> TaskResult:
    """Compute a task's metrics from the outcomes of its items."""
    metrics = {name: mean_estimate([outcome.metrics[name] for outcome in outcomes]) for name in outcomes[0].metrics}
    if task.kind == "last_word":
        metrics["perplexity"] = perplexity_estimate([outcome.log_likelihoods[0] for outcome in outcomes])
    return TaskResult(task.name, task.kind, metrics, task.chance, tuple(outcomes))


def _outcome(item: Item, scores: Sequence[Score], kind: str) -> Outcome:
    logs = tuple(score.log_likelihood for score in scores)
    if kind == "last_word":
        return Outcome(item.id, logs, {"acc": float(scores[0].greedy)})
    metrics = {"acc": float(_best(logs) == item.label)}
    if item.lengths:
        for name, size in (("acc_norm", len), ("acc_bytes", lambda text: len(text.encode("utf-8")))):
            per_unit = [value / size(text) for value, text in zip(logs, item.lengths, strict=True)]
            metrics[name] = float(_best(per_unit) == item.label)
    return Outcome(item.id, logs, metrics)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)  # the first of equal ones
