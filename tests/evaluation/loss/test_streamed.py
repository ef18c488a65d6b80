"""A checkpoint evaluated a layer at a time gives what the loaded model gives."""

import pytest
import torch
from task_rows import ROWS
from tiny import make_model, padded_batch, tiny_tokenizer

from optimum_dern.evaluation.agreement.logits_cache import cache_logits
from optimum_dern.evaluation.agreement.measure import agreement
from optimum_dern.evaluation.loss.perplexity import evaluate_texts
from optimum_dern.evaluation.loss.streamed import StreamedCheckpoint, evaluate_checkpoint
from optimum_dern.evaluation.tasks.accuracy import evaluate_tasks
from optimum_dern.evaluation.tasks.load import make_task


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_streamed(tmp_path, family):
    """Losses, tasks and agreement, with several texts and padding."""
    model = make_model(family, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    texts = {
        "a": [padded_batch([9, 4], "left"), padded_batch([12], "left", 7)],
        "b": [padded_batch([5, 8], "left", 9)],
    }
    cpu = torch.device("cpu")
    for name, loss in evaluate_checkpoint(tmp_path / "model", texts, cpu).items():
        expected = evaluate_texts(model, texts)[name]
        assert (loss.loss, loss.tokens) == (pytest.approx(expected.loss, rel=1e-5), expected.tokens)
    streamed = StreamedCheckpoint(tmp_path / "model", cpu)
    tasks = [make_task(name, ROWS[name]) for name in ("riddles", "lambada_openai")]
    results = [evaluate_tasks(source, tiny_tokenizer(), tasks) for source in (streamed, model)]
    for task in tasks:
        for one, other in zip(*(result[task.name].outcomes for result in results), strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
    cache = cache_logits(streamed, texts, tmp_path / "cache", 8)
    assert agreement(model, cache)["a"].kl_at_least == pytest.approx(0, abs=1e-5)
    assert agreement(streamed, cache)["b"].tokens == 4 + 7
    assert all(parameter.device.type == "meta" for parameter in streamed.skeleton.parameters())
