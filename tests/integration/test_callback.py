"""`DernEvaluationCallback` in a `Trainer`: what it logs, when, and that it leaves no trace in the model."""

import json
import math

import pytest
import torch
from tiny import VOCABULARY, compress, make_model, random_tokens, same_state, state_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from optimum_dern.evaluation.agreement.logits_cache import cache_logits
from optimum_dern.evaluation.agreement.measure import agreement
from optimum_dern.evaluation.loss.perplexity import evaluate_loss
from optimum_dern.integration.trainer import DernEvaluationCallback


def batches(n, seed=0, length=24):
    """Token batches of two random sequences each."""
    ids = torch.stack([row["input_ids"] for row in random_tokens(n, length, seed)])
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


@pytest.fixture(scope="module")
def texts():
    """Two texts of different lengths."""
    return {"books": batches(4), "code": batches(6, seed=1, length=16)}


@pytest.fixture(scope="module")
def cache(texts, tmp_path_factory):
    """All of the original's predictions."""
    return cache_logits(make_model("mixtral"), texts, tmp_path_factory.mktemp("predictions") / "cache", VOCABULARY)


def make_trainer(model, folder, cache, **arguments):
    """A Trainer of four steps, with the callback."""
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in random_tokens(8)]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=5e-3,
            **{"max_steps": 4, "save_strategy": "no", "logging_strategy": "no", **arguments},
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.add_callback(DernEvaluationCallback(trainer, cache))
    return trainer


@torch.no_grad()
def distance_by_definition(original, model, texts):
    """Divergence and agreement over all predicted tokens, in float64."""
    divergence = agreed = tokens = 0
    for batch in (batch for text in texts for batch in text):
        p, q = (m.eval()(**batch).logits[:, :-1].double().log_softmax(-1) for m in (original, model))
        divergence += (p.exp() * (p - q)).sum().item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
        tokens += p[..., 0].numel()
    return divergence / tokens, agreed / tokens


def test_values(texts, cache, tmp_path):
    """Loss, perplexity, divergence and agreement by their definitions, over all texts and of each."""
    original, model = make_model("mixtral"), make_model("mixtral")
    compress(model)
    metrics = make_trainer(model, tmp_path, cache).evaluate()
    everything = [batch for text in texts.values() for batch in text]
    for prefix, parts in {"": everything, "books_": texts["books"], "code_": texts["code"]}.items():
        divergence, agreed = distance_by_definition(original, model, [parts])
        loss = evaluate_loss(model, parts).loss
        assert metrics[f"eval_dern_{prefix}loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"eval_dern_{prefix}perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert metrics[f"eval_dern_{prefix}kl"] == pytest.approx(divergence, rel=1e-4)
        assert metrics[f"eval_dern_{prefix}top1"] == pytest.approx(agreed)
    assert "eval_loss" in metrics


def test_the_divergence_is_no_bound(texts, tmp_path):
    """With few of the original's tokens it is an unbiased estimate, within the noise of its draws."""
    original, model = make_model("mixtral"), make_model("mixtral")
    compress(model)
    cache = cache_logits(original, texts, tmp_path / "cache", 8)
    logged = make_trainer(model, tmp_path, cache).evaluate()["eval_dern_books_kl"]
    divergence, _ = distance_by_definition(original, model, [texts["books"]])
    bound = agreement(model, cache)["books"].kl_at_least
    assert bound < 0.8 * divergence and logged == pytest.approx(divergence, rel=0.1)


def test_the_original_agrees_with_itself(cache, tmp_path):
    """No divergence, full agreement."""
    values = make_trainer(make_model("mixtral"), tmp_path, cache).evaluate()
    assert values["eval_dern_kl"] == pytest.approx(0, abs=1e-6)
    assert values["eval_dern_top1"] == 1


def test_one_text_has_no_values_of_its_own(tmp_path):
    """They would repeat the totals."""
    model = make_model("mixtral")
    cache = cache_logits(model, {"text": batches(2)}, tmp_path / "cache")
    names = {name for name in make_trainer(model, tmp_path / "run", cache).evaluate() if "dern" in name}
    assert names == {f"eval_dern_{name}" for name in ("loss", "perplexity", "kl", "top1")}


def test_logged_at_every_evaluation_step(cache, tmp_path):
    """The values are in the trainer's state, in what other callbacks see, and decide which checkpoint is best."""
    seen = []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **options):
            seen.append((state.global_step, set(logs)))

    trainer = make_trainer(
        make_model("mixtral", seed=1),
        tmp_path,
        cache,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="dern_top1",
        greater_is_better=True,
    )
    trainer.add_callback(Reader())
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "eval_dern_kl" in entry}
    assert sorted(logged) == [2, 4]
    assert [step for step, names in seen if "eval_dern_kl" in names] == [2, 4]
    assert trainer.state.best_metric == max(entry["eval_dern_top1"] for entry in logged.values())
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text("utf-8"))
    assert any("eval_dern_code_kl" in entry for entry in state["log_history"])


def test_measuring_leaves_no_trace(cache, tmp_path):
    """Weights, modes of all modules, gradients and the course of the training are the same without the callback."""
    model = make_model("mixtral", attention_dropout=0.1).train()
    model.model.layers[0].eval()
    modes, before = {name: m.training for name, m in model.named_modules()}, state_of(model)
    callback = next(
        callback
        for callback in make_trainer(model, tmp_path, cache).callback_handler.callbacks
        if isinstance(callback, DernEvaluationCallback)
    )
    assert callback.measure() == callback.measure()
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert same_state(before, state_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    ends = []
    for measured in (True, False):
        model = make_model("mixtral", attention_dropout=0.1)
        trainer = make_trainer(model, tmp_path, cache, eval_strategy="steps", eval_steps=1)
        if not measured:
            trainer.remove_callback(DernEvaluationCallback)
        trainer.train()
        ends.append(state_of(model))
    assert same_state(*ends)
