"""Accuracy from log-likelihoods, by hand."""

import math

import pytest
import torch
from task_rows import ROWS
from tiny import make_model, tiny_tokenizer

from optimum_dern.evaluation.tasks.accuracy import evaluate_tasks, make_result
from optimum_dern.evaluation.tasks.load import make_task
from optimum_dern.evaluation.tasks.scoring import Score
from optimum_dern.results.estimate import mean_estimate, paired_difference, perplexity_estimate


def result_of(rows, likelihoods, greedy=False):
    """The result where the requests of every row have these log-likelihoods."""
    return make_result(make_task("t", rows), [[Score(value, greedy, 1) for value in row] for row in likelihoods])


def test_normalisation():
    """The largest sum, the largest mean per character, the largest mean per byte: three answers to one question."""
    row = {"context": "c", "choices": ["abcd", "éé", "abcdefgh"], "label": 1}
    likelihoods = (-4.0, -3.0, -7.0)  # per character -1, -1.5, -0.875; per byte -1, -0.75, -0.875
    metrics = [result_of([row | {"label": label}], [likelihoods]).metrics for label in range(3)]
    assert [m["acc"].value for m in metrics] == [0, 1, 0]
    assert [m["acc_norm"].value for m in metrics] == [0, 0, 1]
    assert [m["acc_bytes"].value for m in metrics] == [0, 1, 0]


def test_ties_go_to_the_first():
    """As in lm-eval."""
    rows = [{"choices": ["a", "b"], "label": label} for label in (0, 1)]
    assert result_of(rows, [(-1.0, -1.0)] * 2).values() == [1, 0]


def test_standard_errors():
    """That of a mean of items, with the sample's variance."""
    rows = [{"choices": ["a", "b"], "label": 0}] * 5
    accuracy = result_of(rows, [(-1.0, -2.0)] * 3 + [(-2.0, -1.0)] * 2).metrics["acc"]
    assert accuracy.value == pytest.approx(0.6)
    assert accuracy.standard_error == pytest.approx(math.sqrt(5 * 0.6 * 0.4 / 4 / 5))


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("riddles", {"acc", "acc_norm", "acc_bytes"}),
        ("mmlu", {"acc"}),
        ("blimp", {"acc"}),
        ("winogrande", {"acc"}),
        ("lambada_openai", {"acc", "perplexity"}),
    ],
)
def test_metrics_of_a_kind(name, metrics):
    """Letters, sentences and continuations have nothing to normalise by."""
    task = make_task(name, ROWS[name])
    scores = [[Score(-1.0, False, 1) for _ in item.requests] for item in task.items]
    assert set(make_result(task, scores).metrics) == metrics


def test_last_words():
    """Accuracy counts greedy words; the perplexity is that of a word, its error carried through the exponential."""
    result = result_of(ROWS["lambada_openai"], [[-1.0], [-2.0], [-6.0]], greedy=True)
    assert result.metrics["acc"].value == 1
    assert result_of(ROWS["lambada_openai"], [[-1.0]] * 3, greedy=False).metrics["acc"].value == 0
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(3))
    deviation = torch.tensor([1.0, 2.0, 6.0]).std().item()
    assert result.metrics["perplexity"].standard_error == pytest.approx(math.exp(3) * deviation / math.sqrt(3))
    assert perplexity_estimate([-1e6]).value == math.inf


def test_main_metric():
    """Papers report acc_norm of some tasks."""
    likelihoods = [[-1.0, -2.0, -3.0, -4.0]] * 3
    for name, metric in (("openbookqa", "acc_norm"), ("riddle", "acc")):
        result = make_result(
            make_task(name, ROWS["openbookqa"]), [[Score(value, False, 1) for value in row] for row in likelihoods]
        )
        assert result.main_metric == metric
        assert result.main == result.metrics[metric]
        assert result.values() == [outcome.metrics[metric] for outcome in result.outcomes]
        assert result.to_dict()["metrics"][metric] == result.main.to_dict()
        assert (result.to_dict()["items"], result.to_dict()["chance"]) == (3, 0.25)


def test_paired_difference():
    """The error of the differences, smaller than that of two separate means where models agree."""
    first, second = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    change = paired_difference(first, second)
    assert change.value == pytest.approx(-1 / 6)
    assert change.standard_error == pytest.approx(torch.tensor([0, 0, 0, 0, -1.0, 0]).std().item() / math.sqrt(6))
    assert change.standard_error < mean_estimate(first).standard_error
    with pytest.raises(ValueError, match="cannot pair 6 items with 1"):
        paired_difference(first, [1.0])


def test_tasks_together_and_alone():
    """All tasks go through the model at once, and each gets its own items back."""
    model, tokenizer = make_model("mixtral", max_position_embeddings=256), tiny_tokenizer()
    tasks = [make_task(name, rows) for name, rows in ROWS.items()]
    together = evaluate_tasks(model, tokenizer, tasks)
    assert list(together) == list(ROWS)
    for task in tasks:
        alone = evaluate_tasks(model, tokenizer, [task])[task.name]
        assert alone.metrics.keys() == together[task.name].metrics.keys()
        for one, other in zip(alone.outcomes, together[task.name].outcomes, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
            assert (one.id, one.metrics) == (other.id, other.metrics)
        assert len(alone.outcomes[0].log_likelihoods) == len(task.items[0].requests)
