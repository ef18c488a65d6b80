"""The merging methods as the engine runs them: options, router entries, the guard, and families of every kind."""

import families
import pytest
import torch
from tiny import compress, make_model, random_tokens, same_state, state_of

from optimum_dern import DernConfig
from optimum_dern.methods import get_method


MERGING = ["ream", "m_smoe", "hc_smoe", "mergemoe", "sub_moe", "uncurl"]
TRAITS = ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h"]  # plain, groups, biases, input, no gate


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("family", TRAITS)
def test_families(method, family, monkeypatch):
    """The merged layer is written as proposed, with the router entries of its representatives, and runs."""
    if family == "nemotron_h" and method in ("ream", "m_smoe", "uncurl"):
        with pytest.raises(ValueError, match="reads 32 inputs, and its experts read 24; choose hc_smoe"):
            compress(families.make_model(family), method=method, preset="paper")
        return
    proposed, cls = [], type(get_method(method))
    original = cls.compress_layer

    def listen(self, problem, config):
        proposed.append((problem, original(self, problem, config)["merged"]))
        return {"merged": proposed[-1][1]}

    monkeypatch.setattr(cls, "compress_layer", listen)
    model, before = families.make_model(family), state_of(families.make_model(family))
    report = compress(model, method=method, preset="paper").report
    after = state_of(model)
    assert len(report.layers) == len(proposed) == 2
    for layer, (problem, candidate) in zip(report.layers, proposed, strict=True):
        assert (layer.winner, layer.retained) == ("merged", candidate.retained.tolist())
        if problem.layer.num_groups > 1:
            assert [expert // 4 for expert in layer.retained] == [0, 0, 1, 1]
        routed = [
            name
            for name, tensor in after.items()
            if name.startswith(f"{layer.name}.") and tensor.shape != before[name].shape and ".experts." not in name
        ]
        assert routed
        for name in routed:  # rows and biases
            dim = [a != b for a, b in zip(after[name].shape, before[name].shape, strict=True)].index(True)
            assert torch.equal(after[name], before[name].index_select(dim, candidate.retained))
        down = after[f"{layer.name}.experts.down_proj"]
        written = candidate.segments.down
        assert torch.equal(
            down, written if down.shape == written.shape and not _transposed(model, layer) else written.mT
        )
    logits = model(**random_batch()).logits
    assert torch.isfinite(logits).all()


def _transposed(model, layer):
    """Whether the experts store their down projections as (E, out, in)."""
    from optimum_dern.models.moe.structure import find_moe_layers

    return not next(found for found in find_moe_layers(model) if found.name == layer.name).layout.transposed


def random_batch():
    """One batch of random tokens."""
    ids = torch.stack([row["input_ids"] for row in random_tokens(2, 16, seed=5)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("method", MERGING)
def test_the_guard_and_the_refits(method):
    """Every candidate is judged, the best is refitted, and the report names its representatives."""
    models = [make_model("mixtral") for _ in range(2)]
    fields = {"method": method, "dataset": random_tokens(30), "neuron_refit": False}
    layers, again = (compress(m, **fields).report.layers for m in models)
    for layer, other in zip(layers, again, strict=True):
        best = min("pruned", "merged", key=layer.errors.get)
        assert set(layer.errors) - {f"{best}+refit+router"} == {"pruned", "merged", f"{best}+refit"}
        assert layer.errors[layer.winner] == min(layer.errors.values())
        assert layer.retained == sorted(set(layer.retained)) and len(layer.retained) == 4
        assert (layer.winner, layer.retained, layer.errors) == (other.winner, other.retained, other.errors)
    assert same_state(*map(state_of, models))


def test_a_merged_layer_can_win():
    """Experts that are copies in pairs are merged without loss where a token takes one; pruning loses some pairs."""
    model = make_model("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            experts, gate = layer.mlp.experts, layer.mlp.gate.weight
            experts.gate_up_proj[1::2], experts.down_proj[1::2] = experts.gate_up_proj[::2], experts.down_proj[::2]
            gate[1::2] = gate[::2] + 0.01 * gate[1::2]
    for layer in compress(model, method="hc_smoe", refit=False).report.layers:
        assert layer.winner == "merged" and [expert // 2 for expert in layer.retained] == [0, 1, 2, 3]
        assert layer.errors["merged"] < 1e-10 < 0.1 < layer.errors["pruned"]


@pytest.mark.parametrize("method", MERGING)
def test_padding_does_not_count(method):
    """Tokens behind an attention mask of zeros change nothing."""
    states = []
    for extra in (0, 5):
        rows = []
        for row in random_tokens(6, 20):
            ids = torch.cat([row["input_ids"], torch.full((extra,), 7)])
            mask = torch.cat([torch.ones(20, dtype=torch.long), torch.zeros(extra, dtype=torch.long)])
            rows.append({"input_ids": ids, "attention_mask": mask})
        model = make_model("mixtral")
        compress(model, method=method, preset="paper", dataset=rows)
        states.append(state_of(model))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)


def test_the_saliency_of_the_paper():
    """Each method ranks experts as its paper does, unless told otherwise; REAM goes layer by layer."""
    expected = {"dern": "router", "prune": "router", "ream": "reap"} | dict.fromkeys(MERGING[1:], "frequency")
    for method, selection in expected.items():
        for preset in ("recommended", "paper"):
            config = DernConfig(method=method, preset=preset)
            assert config.selection == selection
            assert DernConfig.from_dict(config.to_dict()) == config
            assert DernConfig(method=method, selection="man").selection == "man"
            sequential = preset == "recommended" or method == "ream"
            assert config.calibration_order == ("sequential" if sequential else "oneshot")
    assert DernConfig(method="ream", preset="paper", calibration_order="oneshot").calibration_order == "oneshot"


def test_the_selection_arrives():
    """A saliency of the user's own decides which experts absorb the others, and what they weigh."""
    states = []
    for options in ({}, {}, {"selection": "frequency"}):
        model = make_model("qwen3_moe")
        compress(model, method="ream", preset="paper", **options)
        states.append(state_of(model))
    assert same_state(*states[:2])
    assert not same_state(*states[1:])


@pytest.mark.parametrize("method", MERGING)
def test_protected_experts(method):
    """They represent a group in the layer that names them."""
    report = compress(make_model("mixtral"), method=method, preset="paper", protect_experts={1: [0, 7]}).report
    assert {0, 7} <= set(report.layers[1].retained)
