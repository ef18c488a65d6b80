"""Metrics for Trainer and for the `evaluate` package: their numbers by hand, in every form that Trainer gives them."""

import math
import subprocess
import sys
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from tiny import AUX_LOSS, PAD, make_model, padded_batch, random_tokens
from transformers import Trainer, TrainingArguments

from optimum_dern.evaluation.loss.hf_metrics import Perplexity, TokenAccuracy
from optimum_dern.evaluation.loss.metrics import (
    mean_and_error,
    perplexity_of,
    token_losses_and_ranks,
    trainer_metrics,
)
from optimum_dern.evaluation.loss.perplexity import evaluate_loss


LENGTHS = [[4, 20, 9], [6, 2, 5], [13]]  # of sequences, by batch


def labelled(batch):
    """A batch with labels, padding left out of them."""
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def batches_and_rows():
    """Padded batches, and the same sequences one by one."""
    batches = [labelled(padded_batch(lengths, "right", seed=7 * i)) for i, lengths in enumerate(LENGTHS)]
    masks = [mask.bool() for batch in batches for mask in batch["attention_mask"]]
    ids = [ids for batch in batches for ids in batch["input_ids"]]
    return batches, [{"input_ids": i[m], "labels": i[m]} for i, m in zip(ids, masks, strict=True)]


def collate(rows):
    """Pad on the right to the longest of the batch."""

    def pad(sequences, value):
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    mask = pad([torch.ones_like(row) for row in ids], 0)
    return {"input_ids": pad(ids, PAD), "labels": pad([row["labels"] for row in rows], -100), "attention_mask": mask}


def run_trainer(model, rows, folder, metrics=None, **arguments):
    """What `Trainer.evaluate` gives."""
    arguments = {"per_device_eval_batch_size": 3, "report_to": "none", "use_cpu": True, **arguments}
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=folder, **arguments),
        eval_dataset=rows,
        data_collator=collate,
        **(metrics or trainer_metrics()),
    )
    return trainer.evaluate()


def by_hand(model, rows, top_k=5):
    """Losses and ranks, token by token from unpadded sequences."""
    losses, ranks = [], []
    for row in rows:
        with torch.no_grad():
            logs = model(input_ids=row["input_ids"][None]).logits[0].double().log_softmax(-1)
        for t, token in enumerate(row["input_ids"][1:].tolist()):
            losses.append(-logs[t, token].item())
            ranks.append(logs[t].argsort(descending=True).tolist().index(token))
    hits = [sum(rank < k for rank in ranks) / len(ranks) for k in (1, top_k)]
    return sum(losses) / len(losses), *hits, len(losses)


@pytest.mark.parametrize("family", [*AUX_LOSS, "deepseek_v3"])
def test_trainer_gives_the_loss_of_evaluate_loss(family, tmp_path):
    """Batches of different lengths, padded by Trainer: loss and error as in perplexity.py, accuracies by hand."""
    model, (batches, rows) = make_model(family), batches_and_rows()
    loss, first, top, tokens = by_hand(model, rows)
    result, ours = run_trainer(model, rows, tmp_path), evaluate_loss(model, batches)
    assert result["eval_tokens"] == tokens == ours.tokens == 3 + 19 + 8 + 5 + 1 + 4 + 12
    assert result["eval_token_loss"] == pytest.approx(ours.loss, rel=1e-6) == pytest.approx(loss, rel=1e-5)
    assert result["eval_token_loss_stderr"] == pytest.approx(ours.standard_error, rel=1e-5)
    assert result["eval_perplexity"] == pytest.approx(ours.perplexity, rel=1e-5)
    assert (result["eval_token_accuracy"], result["eval_top5_accuracy"]) == pytest.approx((first, top))
    assert abs(result["eval_loss"] - loss) > 1e-3  # Trainer's is a mean of batch means


@pytest.mark.parametrize(
    "arguments",
    [
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 7},
    ],
)
def test_every_mode_of_trainer(arguments, tmp_path):
    """However Trainer collects the predictions, the metrics are the same, also a second time."""
    model, (_, rows) = make_model("mixtral"), batches_and_rows()
    expected = make_subset(run_trainer(model, rows, tmp_path))
    metrics = trainer_metrics()
    for _ in range(2):
        result = run_trainer(model, rows, tmp_path, metrics, **arguments)
        assert make_subset(result) == pytest.approx(expected, rel=1e-5)


def make_subset(result):
    """The entries that are ours."""
    ours = ("token_loss", "token_loss_stderr", "perplexity", "token_accuracy", "top5_accuracy", "tokens")
    return {name: result[f"eval_{name}"] for name in ours}


def test_outputs_beside_the_logits(tmp_path):
    """With router logits and an auxiliary loss in the output, the metrics stay those of the text."""
    model, (batches, rows) = make_model("mixtral", router_aux_loss_coef=0.5), batches_and_rows()
    expected = evaluate_loss(model, batches)
    plain = run_trainer(model, rows, tmp_path)
    model.config.output_router_logits = True
    result = run_trainer(model, rows, tmp_path)
    assert result["eval_token_loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert result["eval_loss"] > plain["eval_loss"] + 0.5  # the auxiliary loss is at least top_k


def preprocess(logits, labels):
    """The losses and ranks that Trainer keeps."""
    return trainer_metrics()["preprocess_logits_for_metrics"](logits, labels)


def test_the_right_output_is_taken():
    """Of several outputs, the one with a row of numbers for every label; none is an error that lists them."""
    logits, labels = torch.randn(2, 4, 9), torch.randint(9, (2, 4))
    expected = token_losses_and_ranks(logits, labels)
    outputs = (torch.tensor(0.3), torch.randn(8, 4), (torch.randn(2, 4, 9),), torch.randn(2, 1, 9), logits)
    for given in (logits, outputs, list(outputs)):
        result = preprocess(given, labels)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(8, 4\)"):
        preprocess(outputs[:-1], labels)


def test_memory_and_gradients():
    """No gradient and no logits are kept: one float and one integer a token."""
    logits = torch.randn(2, 6, 1000, requires_grad=True)
    losses, ranks = preprocess(logits, torch.zeros(2, 6, dtype=torch.int64))
    assert losses.shape == ranks.shape == (2, 5)
    assert (losses.dtype, ranks.dtype) == (torch.float32, torch.int64)
    assert not losses.requires_grad


def test_ranks_with_ties_and_nan():
    """Equal logits are ranked as argmax ranks them, and a model of NaN gets nothing right."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [math.nan] * 5, [5.0, math.nan, 1.0, 1.0, 1.0], [0.0] * 5])
    labels = torch.tensor([[0, 2, 0, 0]])
    losses, ranks = token_losses_and_ranks(logits[None], labels)
    assert ranks.tolist() == [[1, 5, 1]]
    assert logits[0].argmax() == 1
    assert losses[0, 1].isnan() and losses[0, 0] == pytest.approx(-logits[0].log_softmax(0)[2].item())


def test_bfloat16_logits():
    """They are read in float32, as evaluate_loss reads them."""
    logits, labels = torch.randn(1, 50, 300).bfloat16(), torch.randint(300, (1, 50))
    losses, _ = token_losses_and_ranks(logits, labels)
    exact, _ = token_losses_and_ranks(logits.double(), labels)
    assert torch.allclose(losses, exact, rtol=1e-6)


def prediction(losses, ranks, labels):
    return SimpleNamespace(predictions=(np.array(losses), np.array(ranks)), label_ids=np.array(labels))


def test_numbers_by_hand():
    """Two sequences, three tokens that count: mean, ratio error, accuracies; ignored positions hold garbage."""
    given = prediction([[1.0, -100.0, 3.0], [5.0, 9.0, -100.0]], [[0, -100, 4], [5, 0, -100]],
                       [[7, 7, -100, 7], [-100, 7, -100, -100]])  # fmt: skip
    result = trainer_metrics()["compute_metrics"](given)
    assert (result["token_loss"], result["tokens"]) == (3.0, 3)
    assert result["token_loss_stderr"] == pytest.approx(math.sqrt(2 * ((4 - 6) ** 2 + (5 - 3) ** 2)) / 3)
    assert result["perplexity"] == pytest.approx(math.exp(3))
    assert (result["token_accuracy"], result["top5_accuracy"]) == (1 / 3, 2 / 3)
    assert trainer_metrics(6)["compute_metrics"](given)["top6_accuracy"] == 1
    assert trainer_metrics(1)["compute_metrics"](given)["top1_accuracy"] == 1 / 3


def test_what_cannot_be_measured():
    """No label, and a top_k of nothing, are refused; a huge loss has an infinite perplexity, NaN stays NaN."""
    with pytest.raises(ValueError, match="no token to predict.*labels"):
        trainer_metrics()["compute_metrics"](prediction([[1.0]], [[0]], [[5, -100]]))
    with pytest.raises(ValueError, match="top_k is 0"):
        trainer_metrics(top_k=0)
    mean, error = mean_and_error([6.0], [3])
    assert mean == 2.0 and math.isnan(error)  # one sequence tells nothing of the spread
    assert perplexity_of(1000.0) == math.inf
    assert math.isnan(perplexity_of(math.nan))


@pytest.mark.parametrize("in_memory", [True, False])
def test_metrics_of_evaluate(in_memory, tmp_path):
    """Batch by batch, alone and combined, they agree with evaluate_loss and with Trainer's metrics, offline."""
    model, (batches, rows) = make_model("qwen3_moe"), batches_and_rows()
    expected, trained = evaluate_loss(model, batches), run_trainer(model, rows, tmp_path)
    options = {"keep_in_memory": True} if in_memory else {"cache_dir": str(tmp_path)}
    both, alone = evaluate.combine([TokenAccuracy(**options), Perplexity(**options)]), TokenAccuracy(**options)
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses, _ = token_losses_and_ranks(logits, batch["labels"])
        inputs = {"predictions": logits[:, :-1].argmax(-1), "references": batch["labels"][:, 1:]}
        both.add_batch(**inputs, losses=losses)
        alone.add_batch(**inputs)
    result = both.compute()
    assert result["token_loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert result["token_loss_stderr"] == pytest.approx(expected.standard_error, rel=1e-5)
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert result["tokens"] == expected.tokens
    assert result["token_accuracy"] == trained["eval_token_accuracy"] == alone.compute()["token_accuracy"]


def test_metrics_of_evaluate_in_one_call(tmp_path):
    """Lists of different lengths, ignored labels, one by one, and all metrics from one `compute`."""
    inputs = {
        "predictions": [[1, 2, 3], [9]],
        "references": [[1, -100, 4], [9]],
        "losses": [[0.5, 1e9, 1.5], [1.0]],
    }
    options = {"cache_dir": str(tmp_path)}
    both = evaluate.combine([TokenAccuracy(**options), Perplexity(**options)])
    expected = {"token_accuracy": 2 / 3, "token_loss": 1.0, "perplexity": math.e, "tokens": 3}
    result = both.compute(**inputs)
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    single = Perplexity(**options)
    for losses, references in zip(inputs["losses"], inputs["references"], strict=True):
        single.add(losses=losses, references=references)
    assert single.compute()["token_loss"] == 1.0
    with pytest.raises(ValueError, match="sequence 0 has 3 predictions but 2 references; shift"):
        TokenAccuracy(**options).compute(predictions=[[1, 2, 3]], references=[[1, 2]])
    with pytest.raises(ValueError, match="no token to predict"):
        Perplexity(**options).compute(losses=[[0.1]], references=[[-100]])


def test_the_import_stays_light():
    """The metrics of Trainer come without the `evaluate` and `datasets` packages."""
    code = """if True:
        import sys
        from optimum_dern.evaluation.loss import metrics
        metrics.trainer_metrics()
        assert not {'evaluate', 'datasets', 'transformers'} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_are_not_changed():
    """Evaluation data stays what it was."""
    rows = random_tokens(2)
    labels = torch.stack([row["input_ids"] for row in rows])
    before = labels.clone()
    token_losses_and_ranks(torch.randn(2, 24, 300), labels)
    assert torch.equal(before, labels)
