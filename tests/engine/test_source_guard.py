"""The guard by source: no step is taken that harms the text of any source more than plain pruning does."""

import pytest
import torch
from tiny import make_model, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.engine.layer.objective import Objective, relative_errors
from optimum_dern.engine.layer.variant import HeldOutError


def compressed(batches, **fields):
    """The reports of the layers of a model that is compressed with these batches."""
    compressor = DernCompressor(num_experts=4, neuron_refit=False, **fields)
    compressor.compress_model(make_model("qwen3_moe", seed=3), batches=batches)
    return compressor.report.layers


def batches_of(*names):
    """A batch of 20 sequences for every name."""
    rows = random_tokens(20 * len(names))
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows]).split(20)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "source": [name] * 20}
        for part, name in zip(ids, names, strict=True)
    ]


def test_errors_by_source():
    """Each is the relative error over the source's tokens, and the total that over all; no tokens, no error."""
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 9, 5, generator=generator)
    source = torch.tensor([0, 2, 2, 0, 0, 2, 0, 2, 2])
    found = relative_errors(output, target, source, ("a", "b", "c"))
    assert found.by_source.keys() == {"a", "c"}
    for error, tokens in (
        (found.by_source["a"], source == 0),
        (found.by_source["c"], source == 2),
        (found.total, source >= 0),
    ):
        by_hand = (output - target)[tokens].square().sum() / target[tokens].square().sum()
        assert error == pytest.approx(by_hand.item(), rel=1e-5)
    output[1] = torch.inf
    assert relative_errors(output, target, source, ("a", "b", "c")).by_source["c"] == torch.inf


def test_the_report_shows_every_source():
    """With the errors of plain pruning and of the winner; with a single source there is nothing to tell apart."""
    for layer in compressed(batches_of("a", "b", "a", "b")):
        assert layer.source_errors.keys() == {"a", "b"}
        for errors in layer.source_errors.values():
            assert list(errors) == list(dict.fromkeys(["pruned", layer.winner]))
            assert errors[layer.winner] <= errors["pruned"]
    assert all(layer.source_errors == {} for layer in compressed(batches_of("a", "a")))


def test_a_step_that_harms_one_source_is_not_taken(monkeypatch):
    """The refit is best over all, but where it is told to be worse on b it loses to what harms nothing."""
    batches = batches_of("a", "b", "a", "b")
    plain = compressed(batches)
    assert any("refit" in layer.winner for layer in plain)
    error = Objective.error

    def harmful(objective, variant):
        found = error(objective, variant)
        by_source = {"a": found.by_source["a"], "b": 9.0 if "refit" in variant.steps else found.by_source["b"]}
        return HeldOutError(found.total, by_source)

    monkeypatch.setattr(Objective, "error", harmful)
    guarded = compressed(batches)
    assert all("refit" not in layer.winner for layer in guarded)
    assert guarded[0].errors.keys() == plain[0].errors.keys()  # the same steps were judged


def test_of_harmful_variants_steps_may_repair_one(monkeypatch):
    """Where the first steps harm a source, what harms none goes on, and wins after further steps."""
    batches, error = batches_of("a", "b", "a", "b"), Objective.error

    def repaired(objective, variant):
        found, steps = error(objective, variant), variant.steps
        total = found.total if not steps else 0.01 if "router" in steps else 0.02
        worse = steps and "router" not in steps
        return HeldOutError(total, {name: 9.0 if worse else value for name, value in found.by_source.items()})

    monkeypatch.setattr(Objective, "error", repaired)
    first = compressed(batches, router_refit=True)[0]
    assert "router" in first.winner and "scale" not in first.winner
