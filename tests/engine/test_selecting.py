"""Every criterion and protection through the engine: in memory, from disk, padded, interrupted."""

import copy

import pytest
import torch
from pruned_layers import allowed_sets, pruned_error, recorded_block
from tiny import EXPERTS, FIRST_MOE, compress, make_model, random_tokens, same_state, state_of

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.core.criteria.registry import CRITERIA
from optimum_dern.engine.layer.needs import selection_needs
from optimum_dern.models.moe.structure import find_moe_layers


PRUNE = {"method": "prune", "preset": "paper"}
families = pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])


@families
@pytest.mark.parametrize("selection", CRITERIA)
def test_every_criterion_prunes(family, selection):
    """Four experts stay, equal shares of groups, and the slimmer model computes finite logits."""
    model = make_model(family)
    report = compress(model, selection=selection, **PRUNE).report
    groups = getattr(model.config, "n_group", 1)
    for layer in report.layers:
        shares = torch.tensor(layer.retained).div(EXPERTS // groups, rounding_mode="floor").bincount(minlength=groups)
        assert shares.tolist() == [4 // groups] * groups
        assert len(layer.saliency) == EXPERTS and layer.protected == []
    with torch.no_grad():
        assert model(random_tokens(1)[0]["input_ids"].unsqueeze(0)).logits.isfinite().all()


@families
@pytest.mark.parametrize("selection", ["easy_ep", "greedy", "hope", "router"])
def test_padding_does_not_count(family, selection):
    """Sequences of different lengths score experts the same one by one and in a padded batch."""
    rows = [row for seed in range(3) for row in random_tokens(4, length=5 + 9 * seed, seed=seed)]
    one, four = (
        compress(make_model(family), selection=selection, dataset=rows, batch_size=size, **PRUNE).report.layers
        for size in (1, 4)
    )
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(torch.tensor(a.saliency), torch.tensor(b.saliency), rtol=1e-4, atol=1e-5)
        assert a.retained == b.retained


@families
def test_easy_ep_in_a_model(family):
    """The scores are those of the formula on tensors that plain hooks take out of a whole forward pass."""
    model, rows = make_model(family), random_tokens()
    layer, seen = find_moe_layers(model)[0], {}
    norm = model.model.layers[FIRST_MOE.get(family, 0)].post_attention_layernorm
    handles = [
        norm.register_forward_pre_hook(lambda module, args: seen.update(stream=args[0])),
        layer.experts.register_forward_hook(lambda module, args, output: seen.update(arguments=args, routed=output)),
    ]
    with torch.no_grad():
        model(torch.stack([row["input_ids"] for row in rows]))
        for handle in handles:
            handle.remove()
        hidden, index, weight = seen["arguments"]
        stream, routed = seen["stream"].flatten(0, 1), seen["routed"].flatten(0, -2)
        turned = (1 - torch.cosine_similarity(stream, stream + routed, dim=1)).clamp(min=0)
        expected = torch.zeros(EXPERTS)
        for expert in range(EXPERTS):
            for slot in range(index.shape[1]):
                alone = layer.experts(hidden, torch.full_like(index[:, :1], expert), torch.ones(len(hidden), 1))
                chosen = index[:, slot] == expert
                expected[expert] += (weight[:, slot] * alone.norm(dim=1) * turned)[chosen].sum()
    report = compress(model, selection="easy_ep", **PRUNE).report
    torch.testing.assert_close(torch.tensor(report.layers[0].saliency), expected, rtol=1e-4, atol=1e-4)


@families
def test_greedy_takes_the_set_that_the_model_misses_least(family):
    """Of all sets, written into the layer itself so that its own router chooses, the retained one is nearest."""
    model, rows = make_model(family), random_tokens()
    original = copy.deepcopy(model)
    retained = compress(model, selection="greedy", dataset=rows, **PRUNE).report.layers[0].retained
    layer, inputs, target = recorded_block(original, rows)
    errors = {
        tuple(kept): pruned_error(layer, list(kept), inputs, target)
        for kept in allowed_sets(EXPERTS, 4, getattr(original.config, "n_group", 1))
    }
    assert errors[tuple(retained)] == pytest.approx(min(errors.values()), rel=1e-4)
    assert errors[tuple(retained)] < 0.95 * sorted(errors.values())[len(errors) // 2]


def test_greedy_leaves_held_out_tokens_to_the_guard():
    """With the guard, the tokens that judge are not those that selected."""
    rows = random_tokens(20)
    guarded = compress(make_model("mixtral"), method="prune", selection="greedy", refit=False, dataset=rows)
    without = [row for number, row in enumerate(rows) if number % 10 != 9]
    expected = compress(make_model("mixtral"), selection="greedy", dataset=without, **PRUNE)
    torch.testing.assert_close(
        torch.tensor(guarded.report.layers[0].saliency),
        torch.tensor(expected.report.layers[0].saliency),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("family", "selection", "message"),
    [("flex_olmo", "easy_ep", "residual stream"), ("phimoe", "greedy", "no known rule: its weights are neither")],
)
def test_what_a_criterion_cannot_follow_is_refused(family, selection, message):
    """The model stays as it was, and the message says what to use instead."""
    from families import make_model as make_family

    model = make_family(family)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{message}.*choose another selection"):
        compress(model, selection=selection, **PRUNE)
    assert same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("selection", "order"),
    [("easy_ep", "oneshot"), ("easy_ep", "sequential"), ("greedy", "sequential"), ("hope", "oneshot")],
)
def test_the_same_from_disk(selection, order, tmp_path):
    """A streamed checkpoint keeps the experts that the model in memory keeps, by the same scores."""
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path / "source")
    options = {**PRUNE, "selection": selection, "calibration_order": order, "num_experts": 4, "batch_size": 4}
    compressor = DernCompressor(dataset=random_tokens(), **options)
    compressor.compress_model(model)
    report = DernCompressor(dataset=random_tokens(), **options).compress_checkpoint(
        tmp_path / "source", tmp_path / "out"
    )
    for mine, theirs in zip(report.layers, compressor.report.layers, strict=True):
        assert (mine.saliency, mine.retained) == (theirs.saliency, theirs.retained)


def model_with_outliers(factors, family="mixtral", layers=4):
    """A model some of whose experts have larger outputs: {(MoE layer, expert): factor}."""
    model = make_model(family, num_hidden_layers=layers)
    found = find_moe_layers(model)
    with torch.no_grad():
        for (layer, expert), factor in factors.items():
            found[layer].experts.down_proj[expert] *= factor
    return model


@families
def test_super_experts_stay(family):
    """An expert of huge outputs stays although few tokens reach it; every layer keeps the same number."""
    plain = compress(model_with_outliers({}, family), **PRUNE).report.layers
    seldom = min(set(range(EXPERTS)) - set(plain[0].retained), key=lambda expert: -plain[0].load[expert])
    assert plain[0].load[seldom] > 0
    factors = {(0, seldom): 100.0}
    unprotected = compress(model_with_outliers(factors, family), **PRUNE).report.layers
    model = model_with_outliers(factors, family)
    layers = compress(model, protect_experts="super", **PRUNE).report.layers
    assert seldom not in unprotected[0].retained and unprotected[0].protected == []
    assert seldom in layers[0].retained and layers[0].protected == [seldom]
    assert [layer.protected for layer in layers[1:]] == [[]] * (len(layers) - 1)
    assert {len(layer.retained) for layer in layers} == {4}
    assert layers[0].largest_output > 20 * plain[0].largest_output


def test_super_experts_of_a_resumed_run(tmp_path, monkeypatch):
    """What earlier layers had decides about later ones, also where an interrupted run has done them."""
    source = tmp_path / "source"
    model_with_outliers({(0, 2): 1000.0, (1, 3): 20.0}).save_pretrained(source)
    options = {**PRUNE, "num_experts": 4, "batch_size": 4, "protect_experts": "super", "dataset": random_tokens()}
    whole = DernCompressor(**options).compress_checkpoint(source, tmp_path / "whole")
    assert [layer.protected for layer in whole.layers] == [[2], [], [], []]
    note = Manifest.finish_layer

    def interrupted(self, position, value):
        note(self, position, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            DernCompressor(**options).compress_checkpoint(source, tmp_path / "part")
    report = DernCompressor(**options).compress_checkpoint(source, tmp_path / "part")
    found, expected = (
        [(layer.protected, layer.retained, layer.largest_output) for layer in run.layers] for run in (report, whole)
    )
    assert found == expected
    model_with_outliers({(1, 3): 20.0}).save_pretrained(source)  # the same outlier where nothing dwarfs it
    report = DernCompressor(**options).compress_checkpoint(source, tmp_path / "other")
    assert [layer.protected for layer in report.layers] == [[], [3], [], []]


def test_explicit_protection_is_reported():
    """The report names what the user protected."""
    layers = compress(make_model("mixtral"), protect_experts={1: [7, 1]}, **PRUNE).report.layers
    assert [layer.protected for layer in layers] == [[], [1, 7]]


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"selection": "random"}, "nothing"),
        ({"selection": "aimer"}, "weights"),
        ({"selection": "aimer", "protect_experts": {0: [1]}}, "weights"),
        ({"selection": "aimer", "protect_experts": "super"}, "statistics"),
        ({"selection": "hope"}, "statistics"),
        ({"selection": "greedy", "protect_experts": "super"}, "tokens"),
        ({"selection": "easy_ep"}, "residual"),
    ],
)
def test_what_a_selection_needs(fields, needs):
    """The criterion's own needs, and statistics for finding super experts."""
    assert selection_needs(DernConfig(**fields)) == needs
