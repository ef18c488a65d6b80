"""Divergence from the original, through a cache on disk, against the whole distributions."""

import math

import pytest
import torch
from safetensors import safe_open
from tiny import VOCABULARY, make_model, padded_batch

from optimum_dern.evaluation.agreement.logits_cache import LogitsCache, cache_logits
from optimum_dern.evaluation.agreement.measure import agreement
from optimum_dern.evaluation.loss.perplexity import evaluate_texts


@pytest.fixture(scope="module")
def original():
    """The model that predictions are compared with."""
    return make_model("mixtral")


@pytest.fixture(scope="module")
def changed():
    """A model with noise on all weights."""
    model, generator = make_model("mixtral"), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def texts():
    """Two texts of sequences of different lengths, padded on either side."""
    long = [padded_batch([40, 25, 33, 7], "left", seed) for seed in range(3)]
    return {"long": long, "short": [padded_batch([10, 6], "right", 50), padded_batch([8], "left", 60)]}


@torch.no_grad()
def divergences(original, changed, batches):
    """Per sequence, KL of the whole distributions at every predicted position, in float64."""
    sequences = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            logs = [
                m(input_ids=ids[mask].unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
                for m in (original, changed)
            ]
            sequences.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    return sequences


@pytest.mark.parametrize("top_k", [VOCABULARY, VOCABULARY + 50, VOCABULARY - 1])
def test_exact_with_the_whole_vocabulary(tmp_path, original, changed, texts, top_k):
    """With every token cached, or all but one, both figures are the divergence itself, weighted by tokens."""
    cache = cache_logits(original, texts, tmp_path / "cache", top_k)
    assert cache.top_k == min(top_k, VOCABULARY)
    results = agreement(changed, cache)
    assert list(results) == ["long", "short"]
    for name, batches in texts.items():
        exact = torch.cat(divergences(original, changed, batches))
        assert results[name].tokens == len(exact)
        assert results[name].kl.value == pytest.approx(exact.mean().item(), rel=1e-3)
        assert results[name].kl_at_least == pytest.approx(exact.mean().item(), rel=1e-3)
    assert results["long"].kl.value > 0.05


def test_standard_error(tmp_path, original, changed):
    """Sequences of one length: the textbook error of their means."""
    texts = {"text": [padded_batch([12] * 6, "right", seed) for seed in (0, 9)]}
    result = agreement(changed, cache_logits(original, texts, tmp_path / "cache", VOCABULARY))["text"]
    means = torch.stack([sequence.mean() for sequence in divergences(original, changed, texts["text"])])
    assert result.kl.standard_error == pytest.approx((means.std() / math.sqrt(12)).item(), rel=1e-3)


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_few_tokens(tmp_path, original, changed, texts, top_k):
    """The bound holds at any k, and the estimate is the divergence within the noise of its draws."""
    result = agreement(changed, cache_logits(original, texts, tmp_path / "cache", top_k))["long"]
    exact = torch.cat(divergences(original, changed, texts["long"])).mean().item()
    assert 0 < result.kl_at_least < 0.9 * exact
    assert result.kl.value == pytest.approx(exact, rel=0.1)


def test_the_bound_grows(tmp_path, original, changed, texts):
    """More tokens, less that is taken together."""
    bounds = [
        agreement(changed, cache_logits(original, texts, tmp_path / f"{k}", k))["long"].kl_at_least
        for k in (1, 16, 128, VOCABULARY)
    ]
    assert bounds == sorted(bounds) and bounds[0] < 0.5 * bounds[-1]


def test_the_same_model(tmp_path, texts):
    """In bfloat16, where tokens tie for the first place, a model agrees with itself everywhere."""
    model = make_model("mixtral").to(torch.bfloat16)
    model.lm_head.weight.data[150:] = model.lm_head.weight.data[:150]  # every token has a twin
    result = agreement(model, cache_logits(model, texts, tmp_path / "cache", 4))["long"]
    assert (result.top1.value, result.kl_at_least, result.loss_increase.value) == (1, pytest.approx(0, abs=1e-6), 0)
    assert result.kl.value == pytest.approx(0, abs=1e-6)


def test_top_tokens(tmp_path, original, changed, texts):
    """The share of positions where both prefer the same token."""
    result = agreement(changed, cache_logits(original, texts, tmp_path / "cache", 2))["short"]
    same = []
    for batch in texts["short"]:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            best = [m(input_ids=ids[mask].unsqueeze(0)).logits[0, :-1].argmax(-1) for m in (original, changed)]
            same += (best[0] == best[1]).tolist()
    assert 0 < sum(same) < len(same)
    assert result.top1.value == pytest.approx(sum(same) / len(same))


def test_loss_increase(tmp_path, original, changed, texts):
    """The original's loss, and the difference with a smaller error than the two have: the sequences are the same."""
    result = agreement(changed, cache_logits(original, texts, tmp_path / "cache", 2))["long"]
    before, after = (evaluate_texts(model, texts)["long"] for model in (original, changed))
    assert result.original_loss.value == pytest.approx(before.loss, abs=1e-6)
    assert result.original_loss.standard_error == pytest.approx(before.standard_error, rel=1e-4)
    assert result.loss_increase.value == pytest.approx(after.loss - before.loss, abs=1e-5)
    assert result.loss_increase.standard_error < math.hypot(before.standard_error, after.standard_error)


def test_the_cache_on_disk(tmp_path, original, changed, texts):
    """It opens again, knows its tokens, and holds k tokens a predicted position."""
    cache = cache_logits(original, texts, tmp_path / "cache", 5, name="the original")
    again = LogitsCache.load(tmp_path / "cache")
    assert (again.model, again.top_k, again.texts) == ("the original", 5, {"long": 3, "short": 2})
    assert again == cache and agreement(changed, again) == agreement(changed, cache)
    assert again.holds(texts)
    assert not again.holds({"long": texts["long"], "brief": texts["short"]})
    assert not again.holds({"long": texts["long"]})
    other = [*texts["long"][:-1], texts["long"][-1] | {"input_ids": texts["long"][-1]["input_ids"] + 1}]
    assert not again.holds(texts | {"long": other})
    with safe_open(tmp_path / "cache" / "text-001-batch-00000.safetensors", "pt") as file:
        assert file.get_slice("log_probs").get_shape() == [9 + 5, 5]


def test_folders_that_are_not_overwritten(tmp_path, original, texts):
    """A cache goes on request, other files never."""
    short = {"short": texts["short"]}
    cache_logits(original, texts, tmp_path / "cache", 1)
    with pytest.raises(ValueError, match="not an empty folder"):
        cache_logits(original, short, tmp_path / "cache", 1)
    assert cache_logits(original, short, tmp_path / "cache", 1, overwrite=True).texts == {"short": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all of it", "utf-8")
    with pytest.raises(ValueError, match="not an empty folder"):
        cache_logits(original, short, tmp_path / "other", 1, overwrite=True)
    assert (tmp_path / "other" / "thesis.txt").exists()


@pytest.mark.parametrize("there", ["cache.partial", "cache"])
def test_what_others_have_made_stays(tmp_path, original, texts, there):
    """What has the name of an unfinished cache, and files beside a cache's own, are never removed."""
    short = {"short": texts["short"]}
    cache_logits(original, short, tmp_path / "cache", 1)
    (tmp_path / there).mkdir(exist_ok=True)
    (tmp_path / there / "thesis.txt").write_text("all of it", "utf-8")
    says = {"cache.partial": "cache.partial exists.*; remove it if none runs", "cache": "thesis.txt.* move them away"}
    with pytest.raises((FileExistsError, ValueError), match=says[there]):
        cache_logits(original, short, tmp_path / "cache", 2, overwrite=True)
    assert (tmp_path / there / "thesis.txt").exists()
    assert LogitsCache.load(tmp_path / "cache").top_k == 1


def test_an_interrupted_cache(tmp_path, texts):
    """Nothing stays of it, and a cache that was there does."""
    model = make_model("mixtral")
    kept = cache_logits(model, texts, tmp_path / "cache", 3)
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("stopped")

    model.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        cache_logits(model, {"short": texts["short"]}, tmp_path / "cache", 3, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert LogitsCache.load(tmp_path / "cache") == kept and kept.holds(texts)


def test_errors(tmp_path, original, texts):
    """Another vocabulary, nothing to cache, and no cache."""
    cache = cache_logits(original, {"short": texts["short"]}, tmp_path / "cache", 3)
    with pytest.raises(ValueError, match="310 tokens and the original 300"):
        agreement(make_model("mixtral", vocab_size=310), cache)
    with pytest.raises(ValueError, match="top_k is 0"):
        cache_logits(original, texts, tmp_path / "new", 0)
    with pytest.raises(ValueError, match="no text"):
        cache_logits(original, {}, tmp_path / "new", 1)
    with pytest.raises(FileNotFoundError, match="holds no cache"):
        LogitsCache.load(tmp_path / "new")
    facts = (tmp_path / "cache" / "cache.json").read_text("utf-8")
    (tmp_path / "cache" / "cache.json").write_text(facts.replace('"format": 1', '"format": 9'), "utf-8")
    with pytest.raises(ValueError, match="format 9"):
        LogitsCache.load(tmp_path / "cache")
