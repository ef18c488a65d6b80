"""Different numbers of experts in different layers: which, for whom, and what is saved."""

import itertools
import json
import subprocess
import sys

import families
import pytest
import torch
from ragged import RaggedConfig, RaggedForCausalLM
from tiny import COMMON, FAMILIES, compress, make_model, random_tokens, same_state, state_of

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.calibration.data import load_batches
from optimum_dern.engine.budgets import allocate_counts, find_layer_counts, pruning_errors
from optimum_dern.models.layer_counts import check_layer_counts
from optimum_dern.models.structure import find_moe_layers


LOAD = """
import sys, torch
sys.modules["optimum_dern"] = None
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(7))
counts = [len(layer.mlp.experts.down_proj) for layer in model.model.layers]
torch.save({"logits": model.eval()(ids).logits.detach(), "counts": counts}, sys.argv[2])
"""


def ragged_model(layers=3):
    """A random model of the family that can have any number of experts in each layer."""
    fields = {**COMMON, "num_hidden_layers": layers, "num_local_experts": 8, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RaggedForCausalLM(RaggedConfig(**fields, dtype="float32")).eval()
        for position, layer in enumerate(model.model.layers):
            layer.mlp.gate.weight.data *= 1 + position  # from even to uneven loads
    return model


def batches():
    """Calibration tokens."""
    return load_batches(random_tokens(), None, batch_size=4)


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_there_is(seed):
    """Of all counts with this total, none has a smaller sum of errors."""
    generator = torch.Generator().manual_seed(seed)
    allowed = [2, 4, 6, 8]
    errors = {
        layer: dict(zip(allowed, torch.rand(4, generator=generator).double().tolist(), strict=True))
        for layer in (1, 2, 5, 7)
    }
    found = allocate_counts(errors, 20)
    assert sum(found.values()) == 20 and list(found) == [1, 2, 5, 7]
    choices = (dict(zip(errors, counts, strict=True)) for counts in itertools.product(allowed, repeat=4))
    sums = [sum(errors[at][n] for at, n in c.items()) for c in choices if sum(c.values()) == 20]
    assert sum(errors[at][n] for at, n in found.items()) == pytest.approx(min(sums))


def test_allocation_sees_past_the_first_expert():
    """A layer that loses much with the first dropped expert and nothing with the next three gives up all four."""
    steep_then_flat = {8: 0.0, 7: 0.2, 6: 0.2, 5: 0.2, 4: 0.2}
    even = {8: 0.0, 7: 0.1, 6: 0.2, 5: 0.3, 4: 0.4}
    assert allocate_counts({0: steep_then_flat, 1: even}, 12) == {0: 4, 1: 8}


def test_allocation_of_equal_layers():
    """Where all layers are alike and each further expert is missed more, all keep the same number."""
    convex = {count: (8 - count) ** 2 for count in range(2, 9)}
    assert allocate_counts(dict.fromkeys(range(4), convex), 20) == dict.fromkeys(range(4), 5)


def test_impossible_total():
    """More experts than there are, or an odd total of even counts."""
    for total in (17, 7):
        with pytest.raises(ValueError, match=f"cannot make up {total}"):
            allocate_counts({0: {2: 1.0, 8: 0.0}, 1: {2: 1.0, 8: 0.0}}, total)


def test_pruning_errors():
    """One pass gives what pruning to each count gives by itself, and leaves the model as it is."""
    model = make_model("mixtral")
    before, layers, config = state_of(model), find_moe_layers(model), DernConfig(dataset=random_tokens(), batch_size=4)
    errors = pruning_errors(model, layers, batches(), config, [2, 4, 8])
    assert same_state(before, state_of(model))
    alone = pruning_errors(model, layers, batches(), config, [4])
    assert same_state(before, state_of(model))
    assert list(errors) == list(alone) == [0, 1]
    compressor = compress(
        model,
        method="prune",
        refit=False,
        router_refit=False,
        neuron_refit=False,
        calibration_order="oneshot",
    )
    for report in compressor.report.layers:
        curve = errors[report.layer]
        assert curve[4] == pytest.approx(report.errors[report.winner], rel=1e-6)
        assert alone[report.layer][4] == curve[4]
        assert curve[8] == pytest.approx(0, abs=1e-9) and 0 < curve[4] < curve[2]


def test_counts_are_allowed_by_the_router():
    """Groups of experts keep equal shares, each of at least two."""
    model = make_model("deepseek_v3")
    config = DernConfig(dataset=random_tokens(), batch_size=4, num_experts=6)
    counts = find_layer_counts(model, find_moe_layers(model), batches(), config, 6)
    assert list(counts) == [1, 2] and sum(counts.values()) == 12
    assert set(counts.values()) <= {4, 6, 8}


def test_counts_between_measured_ones_are_interpolated(monkeypatch):
    """Of many experts only some counts are measured; the ends are among them, and all counts may be chosen."""
    measured = []

    def errors(model, layers, batches, config, counts, processes):
        measured.extend(counts)
        return {0: {count: float(8 - count) ** 2 for count in counts}, 1: {count: 8.0 - count for count in counts}}

    monkeypatch.setattr("optimum_dern.engine.budgets.pruning_errors", errors)
    monkeypatch.setattr("optimum_dern.engine.budgets.MEASURED", 3)
    model, config = make_model("mixtral"), DernConfig(dataset=random_tokens())
    assert find_layer_counts(model, find_moe_layers(model), [], config, 6) == {0: 8, 1: 4}
    assert measured == [2, 5, 8]
    assert find_layer_counts(model, find_moe_layers(model), [], config, 3) == {0: 4, 1: 2}


@pytest.mark.slow
def test_compressed_model_has_them(tmp_path):
    """Layers keep what the errors say, config and report tell, and a fresh process computes the same without us."""
    model = ragged_model()
    config = DernConfig(dataset=random_tokens(), batch_size=4, num_experts=5)
    expected = find_layer_counts(model, find_moe_layers(model), batches(), config, 5)
    assert len(set(expected.values())) > 1 and sum(expected.values()) == 15
    compressor = compress(model, num_experts=5, layer_budget="error")
    report = compressor.report
    assert {layer.layer: len(layer.retained) for layer in report.layers} == expected
    assert report.after.experts == 5
    assert report.after.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [model.config.per_layer_config[at].num_local_experts for at in expected] == list(expected.values())

    compressor.save(model, tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))
    assert {
        int(at): v["num_local_experts"] for at, v in stored["per_layer_config"].items()
    }.items() <= expected.items()
    command = [sys.executable, "-c", LOAD, tmp_path / "saved", tmp_path / "seen.pt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["counts"] == list(expected.values())
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.allclose(seen["logits"], model.eval()(ids).logits, atol=1e-5)


def test_error_puts_the_model_back(monkeypatch):
    """An error after the counts are known leaves the original."""
    model = ragged_model()
    before = state_of(model)
    monkeypatch.setattr("optimum_dern.engine.budgets.allocate_counts", lambda errors, total: {0: 99, 1: 4, 2: 4})
    with pytest.raises(ValueError, match="99"):
        compress(model, num_experts=5, layer_budget="error")
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4_text", "step3p7"])
def test_families_with_one_count_are_refused(family):
    """Before any work, naming the family; the config stays as it is."""
    model = make_model(family) if family in FAMILIES else families.make_model(family)
    before, config = state_of(model), model.config.to_dict()
    with pytest.raises(ValueError, match="has one count for all layers"):
        compress(model, num_experts=6, layer_budget="error")
    assert same_state(before, state_of(model)) and model.config.to_dict() == config


def test_refusals(tmp_path):
    """Protected experts, missing data, checkpoints on disk and unknown budgets are refused with the reason."""
    model = ragged_model()
    check_layer_counts(model, find_moe_layers(model))
    with pytest.raises(ValueError, match="protect_experts"):
        compress(model, layer_budget="error", protect_experts={0: [1]})
    with pytest.raises(ValueError, match="measures errors on tokens|no calibration data"):
        compress(model, layer_budget="error", dataset=None, method="prune", preset="paper", selection="random")
    make_model("mixtral").save_pretrained(tmp_path / "source")
    compressor = DernCompressor(num_experts=4, dataset=random_tokens(), layer_budget="error")
    with pytest.raises(ValueError, match="compress_model"):
        compressor.compress_checkpoint(tmp_path / "source", tmp_path / "output")
    assert not (tmp_path / "output").exists()
    with pytest.raises(ValueError, match="'uniform', 'error'"):
        DernConfig(layer_budget="greedy")
