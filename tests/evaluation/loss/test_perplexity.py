"""Held-out loss: the mean over tokens, its error, and what evaluation leaves behind."""

import json
import math

import pytest
import torch
from tiny import FAMILIES, make_config, make_model, padded_batch, random_tokens, sample_texts, tiny_tokenizer

from optimum_dern.data.batches import load_batches
from optimum_dern.evaluation.loss.perplexity import (
    TextLoss,
    evaluate_loss,
    evaluate_texts,
    evaluation_length,
    load_texts,
)


def losses_by_hand(model, sequences):
    """Per sequence, the list of -log p of its tokens, token by token from unpadded prefixes' distributions."""
    results = []
    for ids in sequences:
        with torch.no_grad():
            logits = model(input_ids=ids.unsqueeze(0)).logits[0].double()
        logs = logits.log_softmax(-1)
        results.append([-logs[i, ids[i + 1]].item() for i in range(len(ids) - 1)])
    return results


def real_sequences(batches):
    """The sequences of padded batches without their padding."""
    rows = [row for b in batches for row in zip(b["input_ids"], b["attention_mask"].bool(), strict=True)]
    return [ids[mask] for ids, mask in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mean_over_tokens(family, side):
    """Long sequences count by their tokens, and padding is neither predicted nor read."""
    model = make_model(family)
    batches = [padded_batch([4, 20, 9], side), padded_batch([6, 2], side, seed=5), padded_batch([13], side, seed=9)]
    losses = losses_by_hand(model, real_sequences(batches))
    result = evaluate_loss(model, batches)
    every = [loss for sequence in losses for loss in sequence]
    assert result.tokens == len(every) == 3 + 19 + 8 + 5 + 1 + 12
    assert result.sequence_length == 20
    assert result.loss == pytest.approx(sum(every) / len(every), rel=1e-5)
    mean_of_means = sum(sum(sequence) / len(sequence) for sequence in losses) / len(losses)
    assert abs(result.loss - mean_of_means) > 1e-3
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_batching_does_not_matter():
    """One batch or many, the same loss and the same error."""
    model, rows = make_model("mixtral"), [random_tokens(1, length, length)[0] for length in range(5, 17)]
    results = [evaluate_loss(model, load_batches(rows, None, batch_size=size)) for size in (1, 5)]
    assert results[0].tokens == results[1].tokens
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].standard_error == pytest.approx(results[1].standard_error, rel=1e-4)


def test_standard_error_of_equal_lengths():
    """Of sequences of one length it is the textbook error of their means."""
    model, batches = make_model("mixtral"), load_batches(random_tokens(15, 10), None, batch_size=4)
    means = torch.tensor([sum(row) / len(row) for row in losses_by_hand(model, real_sequences(batches))])
    assert evaluate_loss(model, batches).standard_error == pytest.approx((means.std() / 15**0.5).item(), rel=1e-4)


def test_standard_error_of_repeats():
    """Repeating the same sequence brings no spread; repeating the data shrinks the error by the root."""
    model, rows = make_model("mixtral"), random_tokens(6, 10)
    assert evaluate_loss(model, load_batches(rows[:1] * 4, None)).standard_error == pytest.approx(0, abs=1e-6)
    once, often = (evaluate_loss(model, load_batches(rows * times, None)).standard_error for times in (1, 4))
    assert often == pytest.approx(once / 2 * math.sqrt(24 / 23 / (6 / 5)), rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    """Dropout is off during the evaluation only, and no gradient is kept."""
    model = make_model("mixtral", attention_dropout=0.5).train(training)
    first, second = (evaluate_loss(model, load_batches(random_tokens(2), None)) for _ in range(2))
    assert first == second
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_predict():
    """Sequences of one token."""
    with pytest.raises(ValueError, match="at least two tokens"):
        evaluate_loss(make_model("mixtral"), load_batches([[1], [2]], None))


def test_evaluation_length(caplog):
    """What the model is made for, at most 2,048; another one as far as the model reads, with a warning beyond."""
    lengths = {limit: make_config("mixtral", max_position_embeddings=limit) for limit in (256, 4096)}
    assert {limit: evaluation_length(config) for limit, config in lengths.items()} == {256: 256, 4096: 2048}
    assert evaluation_length(lengths[4096], 3000) == 3000 and evaluation_length(lengths[256], 2) == 2
    assert not caplog.records
    assert evaluation_length(lengths[256], 257) == 256
    assert "sequences of 257 tokens are asked for, but the model is made for 256" in caplog.text


def test_load_texts(tmp_path):
    """A folder gives an entry a file, a file one of its name, texts one; all the data is used."""
    (tmp_path / "news.txt").write_text(" ".join(sample_texts()), "utf-8")
    (tmp_path / "code.jsonl").write_text("\n".join(json.dumps(text) for text in sample_texts() * 20), "utf-8")
    (tmp_path / "notes.md").write_text("not data", "utf-8")
    tokenizer = tiny_tokenizer()
    texts = load_texts(tmp_path, tokenizer, 64)
    assert list(texts) == ["code", "news"]
    assert sum(len(batch["input_ids"]) for batch in texts["code"]) == 240
    assert list(load_texts(tmp_path / "news.txt", tokenizer, 64)) == ["news"]
    assert list(load_texts(sample_texts(), tokenizer, 64)) == ["text"]
    few = load_texts(tmp_path, tokenizer, 64, batch_size=3, limit=7)["code"]
    assert [len(batch["input_ids"]) for batch in few] == [3, 3, 1]
    results = evaluate_texts(make_model("mixtral"), {"news": texts["news"]})
    assert isinstance(results["news"], TextLoss)
    assert results["news"].tokens == sum(len(batch["input_ids"]) for batch in texts["news"]) * 63
