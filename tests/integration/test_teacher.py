"""Divergences from a teacher by their definition, whether it is in memory or on disk."""

import pytest
import torch
from distilling import collate, make_trainer, rows, with_noisy_routers
from tiny import VOCABULARY, make_model, padded_batch, random_tokens
from transformers import DataCollatorForLanguageModeling

from optimum_dern.evaluation.agreement.logits_cache import cache_logits, predicted_positions
from optimum_dern.integration.teacher import CachedTeacher, ModelTeacher, cached_rows


def batches(n=16, length=24, size=4):
    """Token batches of random sequences."""
    ids = torch.stack([row["input_ids"] for row in random_tokens(n, length)])
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


def divergence_by_definition(student, teacher, predicted, temperature=1.0):
    """tau^2 sum p (log p - log q), position by position, in float64."""
    total = 0.0
    for i, j in predicted.nonzero().tolist():
        p, q = ((logits[i, j].double() / temperature).softmax(-1) for logits in (teacher, student))
        total += (p * (p.log() - q.log())).sum().item()
    return temperature**2 * total


@pytest.fixture(scope="module")
def padded():
    """A padded batch, a student's and a teacher's logits for it, and the teacher."""
    batch = padded_batch([9, 5, 12], "right")
    teacher, student = make_model("mixtral"), make_model("mixtral", seed=1)
    with torch.no_grad():
        return batch, student(**batch).logits, teacher(**batch).logits, teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_model_teacher(padded, temperature):
    """The divergence over the counted tokens; the teacher keeps its mode and gets no gradient."""
    batch, student, logits, teacher = padded
    predicted = predicted_positions(batch["attention_mask"])
    predicted[0, 3] = False
    student = student.clone().requires_grad_()
    teacher.train()
    total = ModelTeacher(teacher, temperature).divergence(student, batch, predicted)
    assert total.item() == pytest.approx(divergence_by_definition(student, logits, predicted, temperature), rel=1e-5)
    assert teacher.training and teacher.lm_head.weight.grad is None
    total.backward()
    assert student.grad[0, 2].any() and not student.grad[0, 3].any() and not student.grad[1, 5:].any()
    teacher.eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_teacher_of_the_whole_vocabulary(side, tmp_path):
    """It is the model's own divergence, and gradient, whatever the order and padding of the sequences."""
    teacher = make_model("mixtral")
    cache = cache_logits(teacher, {"text": [padded_batch([9, 5, 12], side)]}, tmp_path / "cache", top_k=VOCABULARY)
    batch = padded_batch([9, 5, 12], side)
    order = torch.tensor([2, 0, 1])
    batch = {name: value[order] for name, value in batch.items()}
    predicted = predicted_positions(batch["attention_mask"])
    predicted[0, predicted[0].nonzero()[4]] = False
    results = []
    for held_to in (ModelTeacher(teacher), CachedTeacher(cache)):
        student = torch.randn(3, 12, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()
        total = held_to.divergence(student, batch, predicted)
        total.backward()
        results.append((total.detach(), student.grad))
    for first, second in zip(*results, strict=True):
        assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)


def test_cached_teacher_of_a_few_tokens(padded, tmp_path):
    """The other tokens count as one: by definition, below the whole divergence, with a finite gradient."""
    batch, student, logits, teacher = padded
    cache = cache_logits(teacher, {"text": [batch]}, tmp_path / "cache", top_k=7)
    predicted = predicted_positions(batch["attention_mask"])
    student = student.clone().requires_grad_()
    total = CachedTeacher(cache).divergence(student, batch, predicted)
    expected = 0.0
    for i, j in predicted.nonzero().tolist():
        p, q = logits[i, j].double().softmax(-1), student[i, j].detach().double().softmax(-1)
        top = p.topk(7).indices
        p = torch.cat([p[top], 1 - p[top].sum(0, keepdim=True)])
        q = torch.cat([q[top], 1 - q[top].sum(0, keepdim=True)])
        expected += (p * (p / q).log()).sum().item()
    assert total.item() == pytest.approx(expected, rel=1e-4)
    assert total.item() < 0.99 * divergence_by_definition(student, logits, predicted)
    total.backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_cached_teacher_without_a_tail(tmp_path):
    """Where the kept tokens hold all the probability that a float can tell, the gradient is still finite."""
    teacher = make_model("mixtral")
    teacher.lm_head.weight.data *= 1000  # one token takes everything
    batch = batches(2)[0]
    cache = cache_logits(teacher, {"text": [batch]}, tmp_path / "cache", top_k=2)
    tails = torch.cat([stored["tail"] for stored in cache.batches("text")])
    assert (tails.exp() == 0).any()
    student = torch.randn(2, 24, VOCABULARY, requires_grad=True)
    total = CachedTeacher(cache).divergence(student, batch, predicted_positions(batch["attention_mask"]))
    total.backward()
    assert total.isfinite() and student.grad.isfinite().all()


def test_router_distillation_from_a_cache(tmp_path):
    """Trained on shuffled rows of the cache, the model comes closer to a teacher that is gone."""
    cache = cache_logits(make_model("mixtral"), {"a": batches(8), "b": batches(16)[2:]}, tmp_path / "cache", top_k=150)
    model = with_noisy_routers("mixtral")
    trainer = make_trainer(model, cache, tmp_path)
    trainer.train_dataset = trainer.eval_dataset = cached_rows(cache)
    assert cached_rows(cache) == [{"input_ids": row["input_ids"].tolist()} for row in rows()]
    trainer.data_collator = lambda batch: collate([{"input_ids": torch.tensor(row["input_ids"])} for row in batch])
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * first
    assert make_trainer(model, make_model("mixtral"), tmp_path).evaluate()["eval_loss"] < 0.05


def test_cached_rows_leave_padding_out(tmp_path):
    """Rows are the sequences themselves, which the usual collator pads again."""
    from tiny import tiny_tokenizer

    batch = padded_batch([9, 5, 12], "left")
    cache = cache_logits(make_model("mixtral"), {"text": [batch]}, tmp_path / "cache", top_k=8)
    found = cached_rows(cache)
    assert [len(row["input_ids"]) for row in found] == [9, 5, 12]
    collated = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)(found)
    model = make_model("mixtral", seed=1)
    trainer = make_trainer(model, cache, tmp_path)
    assert trainer.compute_loss(model, dict(collated)).isfinite()


def test_cache_refusals(tmp_path):
    """Sequences that are not in the cache, another vocabulary and another temperature are refused by name."""
    cache = cache_logits(make_model("mixtral"), {"text": batches(4)}, tmp_path / "cache", top_k=8)
    other = padded_batch([9], "right", seed=99)
    predicted = predicted_positions(other["attention_mask"])
    with pytest.raises(ValueError, match="is not in the cache"):
        CachedTeacher(cache).divergence(torch.zeros(1, 9, VOCABULARY), other, predicted)
    with pytest.raises(ValueError, match="301 tokens and its teacher 300"):
        CachedTeacher(cache).divergence(torch.zeros(1, 9, 301), other, predicted)
    with pytest.raises(ValueError, match="cached at temperature 1"):
        make_trainer(make_model("mixtral"), cache, tmp_path, temperature=2.0)
