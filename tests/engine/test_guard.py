"""Which experts stay, which candidate is written, and that the reported errors are true."""

import dataclasses
import re
from functools import partial

import pytest
import torch
from families import make_model as make_family
from tiny import EXPERTS, FAMILIES, FIRST_MOE, compress, make_model, random_tokens, same_state, state_of

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.engine.layer import objective, steps
from optimum_dern.models.moe.structure import find_moe_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_above_one_is_pruning(family):
    """Where nothing moves, refit and guard being off, DERN equals plain pruning bit for bit."""
    states = []
    for fields in ({"method": "dern", "similarity_threshold": 1.5}, {"method": "prune"}):
        model = make_model(family)
        compress(model, refit=False, guard=False, **fields)
        states.append(state_of(model))
    assert same_state(*states)
    moved = make_model(family)
    compress(moved, refit=False, guard=False, recombine=True)
    assert not same_state(states[0], state_of(moved))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_keeps_the_retained_experts_as_they_are(family):
    """Without refit, pruning only selects: weights, router rows and biases are the original entries."""
    model, original = make_model(family), make_model(family)
    layers = {layer.name: layer for layer in compress(model, method="prune", refit=False).report.layers}
    before, after = state_of(original), state_of(model)
    changed = {name for name in before if not before[name].shape == after[name].shape}
    for name, tensor in before.items():
        layer = next((layer for layer in layers.values() if name in changed and name.startswith(layer.name)), None)
        assert torch.equal(after[name], tensor if layer is None else tensor[layer.retained])
    kinds = 4 if family == "deepseek_v3" else 3  # router, gate|up, down, and the correction bias
    assert len(changed) == kinds * (model.config.num_hidden_layers - FIRST_MOE.get(family, 0))


def test_retained_experts_are_the_best_scores():
    """The saliency in the report decides, and survivors keep their order, where only the router is asked."""
    for layer in compress(make_model("mixtral"), method="prune").report.layers:
        best = sorted(range(EXPERTS), key=lambda expert, scores=layer.saliency: (-scores[expert], expert))[:4]
        assert layer.retained == sorted(best)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [12, 40])
def test_the_winner_has_the_lowest_error(family, samples):
    """The guard keeps the best of all candidates, so it never does worse than pruning."""
    names = {"pruned", "pruned+scale", "recombined", "recombined+scale"}
    for layer in compress(make_model(family), dataset=random_tokens(samples), recombine=True).report.layers:
        assert names < layer.errors.keys()
        assert all(re.fullmatch(r"[a-z ]+(\+scale)?(\+refit)?(\+neurons)?", name) for name in layer.errors)
        assert sum(name.endswith("neurons") for name in layer.errors) == 1  # one finalist
        assert layer.errors[layer.winner] == min(layer.errors.values()) <= layer.errors["pruned"]
        assert 0 < layer.moved_share <= 1
        assert layer.held_out_tokens == max(1, samples // 10) * 24


def test_reported_errors_are_true():
    """The winner's error, measured by hand on the held-out sequence from the finished layer's own outputs."""
    model, original = make_model("mixtral"), make_model("mixtral")
    fields = {"drift_correction": 0.0, "batch_size": 1}
    report = compress(model, dataset=random_tokens(9), **fields).report.layers[0]
    outputs = []
    for subject in (original, model):
        block = subject.get_submodule(report.name)
        handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
        with torch.no_grad():
            subject(random_tokens(9)[-1]["input_ids"].unsqueeze(0))
        handle.remove()
    target, output = outputs
    error = ((output - target).square().sum() / target.square().sum()).item()
    assert report.errors[report.winner] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "winner"),
    [
        ({}, "pruned+refit+neurons"),
        ({"recombine": True}, "recombined+refit+neurons"),
        ({"recombine": True, "router_refit": True}, "recombined+refit+router+neurons"),
        ({"recombine": True, "router_refit": True, "neuron_refit": False}, "recombined+refit+router"),
        ({"recombine": True, "neuron_refit": False}, "recombined+refit"),
        ({"recombine": True, "refit": False}, "recombined"),
        ({"method": "prune", "neuron_refit": False}, "pruned+refit"),
        ({"method": "prune", "refit": False}, "pruned"),
    ],
)
def test_without_the_guard_the_method_is_taken(fields, winner):
    """No candidate is judged, and the method's own result is written, refitted where asked."""
    for layer in compress(make_model("qwen3_moe"), guard=False, **fields).report.layers:
        assert (layer.winner, layer.errors, layer.held_out_tokens) == (winner, {}, 0)


def test_refit_lowers_the_error_on_its_own_tokens():
    """With the guard off, the refit brings the logits of the calibration data nearer to the original's."""
    rows = random_tokens(40)
    batch = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        target = make_model("mixtral")(batch).logits
        errors = []
        for refit in (True, False):
            model = make_model("mixtral")
            compress(
                model, dataset=rows, method="prune", guard=False, refit=refit, router_refit=False, neuron_refit=False
            )
            errors.append((model(batch).logits - target).norm())
    assert errors[0] < 0.95 * errors[1]


def test_protected_experts_stay():
    """Experts that the scores would drop stay where they are protected, and only there."""
    plain = compress(make_model("mixtral")).report.layers
    worst = sorted(range(EXPERTS), key=lambda expert: plain[1].saliency[expert])[:2]
    protecting = compress(make_model("mixtral"), protect_experts={1: worst}).report.layers
    assert not set(worst) & set(plain[1].retained)
    assert set(worst) < set(protecting[1].retained)
    assert len(protecting[1].retained) == 4
    assert protecting[0].retained == plain[0].retained


def test_paper_preset():
    """DERN as published: one candidate, no refit, and the statistics of the original model."""
    model = make_model("mixtral")
    compressor = compress(model, preset="paper")
    assert [layer.winner for layer in compressor.report.layers] == ["recombined"] * 2
    oneshot = compress(make_model("mixtral"), calibration_order="oneshot", method="prune").report.layers
    assert [layer.saliency for layer in compressor.report.layers] == [layer.saliency for layer in oneshot]


def test_router_rows_move_with_the_segments():
    """`router_update="rows"` changes the retained rows by the moved share of the dropped ones; "none" does not."""
    original = make_model("mixtral")
    for update in ("none", "rows"):
        model = make_model("mixtral")
        layer = compress(model, preset="paper", router_update=update).report.layers[0]
        rows = model.get_submodule(layer.name).gate.weight
        kept = original.get_submodule(layer.name).gate.weight[layer.retained]
        assert torch.equal(rows, kept) == (update == "none")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_is_refitted_only_where_asked(family):
    """The router's rows move with `router_refit` and stay without; its correction bias always stays."""
    original = make_model(family)
    for asked in (True, False):
        model = make_model(family)
        for layer in compress(model, guard=False, router_refit=asked).report.layers:
            assert ("+router" in layer.winner) == asked
            for name, tensor in model.get_submodule(layer.name).gate.state_dict().items():
                before = original.get_submodule(layer.name).gate.state_dict()[name][layer.retained]
                assert torch.equal(tensor, before) == (not asked or name != "weight")
                assert tensor.isfinite().all()


def test_scales_are_taken_where_the_router_does_not_renormalise(monkeypatch):
    """Slicing a softmax over all experts makes their weights grow: the factors take that back, and lower the error."""
    found = []

    def spy(*args, fit=steps.fit_scales):
        found.append(fit(*args))
        return found[-1]

    monkeypatch.setattr(steps, "fit_scales", spy)
    model = make_model("olmoe", norm_topk_prob=False)
    layers = compress(model, dataset=random_tokens(60), method="prune").report.layers
    assert len(found) == len(layers)
    assert all(scales.mean() < 0.95 for scales in found)
    assert all(layer.errors["pruned+scale"] < layer.errors["pruned"] for layer in layers)


def test_the_ridge_is_chosen_on_held_out_tokens(monkeypatch):
    """Left open, three ridges are tried and the best is written; given, it is the only one."""
    used = []

    def spy(segments, routing, target, activation, ridges, *args, fit=steps.refit_down):
        used.extend(ridges)
        return fit(segments, routing, target, activation, ridges, *args)

    monkeypatch.setattr(steps, "refit_down", spy)
    fields = {"method": "prune", "router_refit": False, "neuron_refit": False, "dataset": random_tokens(40)}
    errors = {}
    for ridge in (None, *steps.RIDGES):
        used.clear()
        report = compress(make_model("mixtral"), refit_ridge=ridge, **fields).report
        layer = report.layers[0]
        errors[ridge] = min(error for name, error in layer.errors.items() if name.endswith("+refit"))
        assert set(used) == (set(steps.RIDGES) if ridge is None else {ridge})
    assert errors[None] == min(errors.values()) < max(errors.values())


def test_the_guard_chooses_between_sets_of_experts():
    """The set of least error competes with the router's, and the winner's router rows are those of its experts."""
    model, original = make_model("qwen3_moe", seed=3), make_model("qwen3_moe", seed=3)
    layers = compress(model, dataset=random_tokens(40)).report.layers
    rivals = [layer for layer in layers if "pruned by error" in layer.errors]
    assert rivals
    plain = compress(make_model("qwen3_moe", seed=3), dataset=random_tokens(40), method="prune").report.layers
    greedy = compress(make_model("qwen3_moe", seed=3), dataset=random_tokens(40), method="prune", selection="greedy")
    first, others = layers[0], (plain[0].retained, greedy.report.layers[0].retained)
    assert first.retained == others["pruned by error" in first.winner]
    rows = original.get_submodule(first.name).gate.weight[first.retained]
    moved = (model.get_submodule(first.name).gate.weight - rows).norm() / rows.norm()
    assert moved < 0.5  # refitted, but those experts' rows


def test_routers_that_round_are_known_as_well():
    """In bfloat16 the logits of 64 experts have ties: the same candidates are judged as in float32."""
    fields = {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 1}
    judged = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("qwen3_moe", **fields).to(dtype)
        asked = {"num_experts": 32, "dataset": random_tokens(24), "neuron_refit": False, "router_refit": True}
        judged.append(set(compress(model, **asked).report.layers[0].errors))
    assert judged[0] == judged[1]
    assert any(name.endswith("+router") or name.endswith("+router+refit") for name in judged[0])
    assert "pruned by error" in judged[0]


def test_a_router_with_a_bias_is_refitted():
    """Of its rows and the bias, which stays."""
    model = make_family("gpt_oss")
    layers = find_moe_layers(model)
    with torch.no_grad():
        for layer in layers:
            layer.router_bias.tensor.copy_(torch.arange(EXPERTS) / 8)
    before = [layer.router_bias.tensor.clone() for layer in layers]
    report = compress(model, guard=False, neuron_refit=False, router_refit=True, method="prune").report
    for layer, found, bias in zip(report.layers, layers, before, strict=True):
        assert layer.winner == "pruned+refit+bias+router"
        assert torch.equal(found.router_bias.tensor, bias[layer.retained])


@pytest.mark.parametrize("guard", [True, False])
def test_held_out_tokens_are_not_fitted(monkeypatch, guard):
    """With the guard, every refit sees all tokens but the held-out ones; without it, all."""
    fitted = []

    def spy(segments, routing, target, *args, fit):
        fitted.append((routing.hidden, target))
        return fit(segments, routing, target, *args)

    monkeypatch.setattr(steps, "refit_down", partial(spy, fit=steps.refit_down))
    rows = random_tokens(7)
    model, seen = make_model("mixtral"), []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.stack([row["input_ids"] for row in rows]))
    handle.remove()
    expected = seen[0].view(7, 24, -1)[: 6 if guard else 7].flatten(0, 1)
    compress(model, dataset=rows, batch_size=3, guard=guard, neuron_refit=False)
    assert len(fitted) == 2  # layers: the best candidate's, or the only one's
    for hidden, target in fitted:
        assert len(hidden) == len(target) == len(expected)
    torch.testing.assert_close(fitted[0][0], expected)


@pytest.mark.parametrize("method", ["m_smoe", "mergemoe", "ream"])
def test_one_set_of_experts_is_one_finalist(monkeypatch, method):
    """A method that names the retained experts, and plain pruning that keeps the same ones, take each step once."""
    calls = []

    def spy(*args, fit=steps.descend_neurons, **kwargs):
        calls.append(args)
        return fit(*args, **kwargs)

    monkeypatch.setattr(steps, "descend_neurons", spy)
    layers = compress(make_model("qwen3_moe"), method=method).report.layers
    assert all({"pruned", "merged"} <= layer.errors.keys() for layer in layers)
    assert len(calls) == len(layers)


def test_nothing_is_judged_twice(monkeypatch):
    """A step that has judged what it makes, as the neuron refit after each pass, hands the error on."""
    judged, passes = [], []
    measure, descend = objective.relative_errors, steps.descend_neurons

    def counted(*args, **kwargs):
        for segments in descend(*args, **kwargs):
            passes.append(1)
            yield segments

    monkeypatch.setattr(objective, "relative_errors", lambda *args: (judged.append(1), measure(*args))[1])
    monkeypatch.setattr(steps, "descend_neurons", counted)
    layers = compress(make_model("mixtral")).report.layers
    without_passes = sum(not name.endswith("neurons") for layer in layers for name in layer.errors)
    assert len(passes) >= len(layers)
    assert len(judged) == without_passes + len(passes)


def test_presets_only_fill_fields():
    """Two configs that are equal in every field but the preset's name give the same bits."""
    given = DernConfig(
        preset="recommended", neuron_refit=False, num_experts=4, dataset=random_tokens(20), batch_size=4
    )
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(DernConfig)}
    states, errors = [], []
    for preset in ("recommended", "paper"):
        model = make_model("qwen3_moe", seed=3)
        compressor = DernCompressor(DernConfig(**fields | {"preset": preset}))
        compressor.compress_model(model)
        states.append(state_of(model))
        errors.append([layer.errors for layer in compressor.report.layers])
    assert same_state(*states) and errors[0] == errors[1]
    assert any("pruned by error" in layer for layer in errors[0])


def test_the_seed_reaches_the_neuron_refit():
    """Its minibatches are drawn by the config's seed; nothing else here is random."""
    states = []
    for seed in (0, 0, 1):
        model = make_model("mixtral")
        compress(model, dataset=random_tokens(60), method="prune", guard=False, seed=seed)
        states.append(state_of(model))
    assert same_state(states[0], states[1]) and not same_state(states[0], states[2])


@pytest.mark.parametrize("guard", [True, False])
def test_steps_that_cannot_be_taken_are_reported(guard):
    """Llama 4 scales the inputs of its experts: its router is not refitted, and no second set of experts is tried."""
    fields = {"neuron_refit": False, "router_refit": True}
    layers = compress(make_family("llama4_text"), guard=guard, **fields).report.layers
    for layer in layers:
        assert set(layer.skipped) == ({"router refit", "second set of experts"} if guard else {"router refit"})
        assert all(layer.skipped.values()) and "router" not in layer.winner
    assert all(not layer.skipped for layer in compress(make_model("mixtral"), **fields).report.layers)
