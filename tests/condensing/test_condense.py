"""Condensed layers: what they compute, what is searched, what plain transformers loads, and what is refused."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import tiny
import torch
from families import FAMILIES as ALL
from families import make_model
from scipy.spatial.distance import jensenshannon
from tiny import TOP_K, WIDTH, padded_batch, same_state, state_of
from transformers import AutoModelForCausalLM

from optimum_dern import DernCompressor
from optimum_dern.condensing import condense_layers
from optimum_dern.condensing.dense_form import possible_layers
from optimum_dern.condensing.layer_search import search_layers
from optimum_dern.condensing.plan import CondensingPlan
from optimum_dern.models.moe.structure import find_moe_layers, layers_by_position
from optimum_dern.models.skeleton import build_like


BATCHES = [padded_batch([20, 24], "left"), padded_batch([18, 9], "right", seed=5)]
# A list of dense layers, no shared experts; how many dense layers come first; a type for every layer.
FAMILIES = {"qwen3_moe": 2 * WIDTH, "deepseek_v3": 48, "hy_v3": 48, "glm4v_moe": 48, "ernie4_5_moe": 48}


def block_of(model, position):
    """The block of the language model's layer at a position."""
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
    return decoder.layers[position].mlp


@pytest.mark.parametrize(("family", "width"), FAMILIES.items())
def test_the_dense_layer(family, width):
    """It is the shared experts and the chosen ones, each with the mean of the weights that the router gave it."""
    model, original = make_model(family), make_model(family)
    layers, routed = find_moe_layers(original), {}
    for layer in layers:

        def keep(module, args, layer=layer):
            routed.setdefault(layer.name, []).append(args)

        layer.experts.register_forward_pre_hook(keep)
    for batch in BATCHES:
        original(**batch)
    (found,) = condense_layers(model, BATCHES, 1, 2, refit=False)
    dense, block = block_of(model, found.layer), block_of(original, found.layer)
    layer = next(layer for layer in layers if layer.block is block)
    assert dense.gate_proj.weight.shape == (width, 32) and len(set(found.retained)) == 2
    real = torch.cat([batch["attention_mask"].flatten().bool() for batch in BATCHES])
    index, weight = (torch.cat([args[n] for args in routed[layer.name]])[real] for n in (1, 2))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(5, 32) if not hasattr(block, "shared_experts") else block.shared_experts(x)
    expected = block.shared_mlp(x) if hasattr(block, "shared_mlp") else expected
    for expert in found.retained:
        mean = weight[index == expert].mean()
        one, ones = torch.full((5, 1), expert), torch.ones(5, 1)
        expected = expected + mean * layer.experts(x, one, ones)
        assert found.saliency[expert] == pytest.approx(mean.item(), rel=1e-5)
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_it(family, tmp_path):
    """The saved checkpoint gives the same logits; other layers have kept their experts, which can be compressed."""
    model = make_model(family)
    left = len(find_moe_layers(model)) - 1
    condense_layers(model, BATCHES, 1, 2)
    assert len(find_moe_layers(model)) == left
    model.save_pretrained(tmp_path)
    loaded, information = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    assert torch.equal(loaded.eval()(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
    rows = [{"input_ids": ids} for ids in BATCHES[0]["input_ids"]]
    DernCompressor(num_experts=4, preset="paper", dataset=rows).compress_model(model)
    assert all(layer.num_experts == 4 for layer in find_moe_layers(model))


@pytest.mark.parametrize("tied", [False, True])
def test_all_layers(tmp_path, tied):
    """A model without any experts left is an ordinary one, too."""
    model = tiny.make_model("qwen3_moe", tie_word_embeddings=tied)
    found = condense_layers(model, BATCHES, 2, 3)
    assert sorted(layer.layer for layer in found) == [0, 1] and not find_moe_layers(model)
    assert model.config.mlp_only_layers == [0, 1] and model.config.intermediate_size == 3 * WIDTH
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**BATCHES[0]).logits, model(**BATCHES[0]).logits)


def test_shared_experts_alone():
    """Without routed experts, the dense layer is the shared ones, and zeros."""
    model, original = make_model("deepseek_v3"), make_model("deepseek_v3")
    (found,) = condense_layers(model, BATCHES, 1, 0, refit=False)
    dense, shared = block_of(model, found.layer), block_of(original, found.layer).shared_experts
    assert (found.layer, found.retained) == (1, [])
    assert torch.equal(dense.gate_proj.weight[:WIDTH], shared.gate_proj.weight)
    assert torch.equal(dense.down_proj.weight[:, :WIDTH], shared.down_proj.weight)
    assert not dense.gate_proj.weight[WIDTH:].any() and not dense.down_proj.weight[:, WIDTH:].any()


def last_hidden(model, batch):
    """What the last decoder layer gives for the real tokens, by a hook of its own."""
    found = []
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, output: found.append(output))
    model(**batch)
    handle.remove()
    output = found[0] if isinstance(found[0], torch.Tensor) else found[0][0]
    return output[batch["attention_mask"].bool()].double()


def test_the_search_against_loops():
    """Of the layers left, the one is taken that brings the least mean divergence, token by token."""
    with torch.no_grad():
        model = tiny.make_model("qwen3_moe", num_hidden_layers=4)
        at = layers_by_position(model, find_moe_layers(model))
        networks = {p: torch.nn.Linear(32, 32, bias=False) for p in (0, 1, 3)}
        for number, network in enumerate(networks.values()):
            network.weight.copy_(torch.randn(32, 32, generator=torch.Generator().manual_seed(number)) * 0.1)
        before = state_of(model)
        original, expected = [last_hidden(model, batch) for batch in BATCHES], {}
        for _ in range(2):
            tried = {}
            for p in (p for p in networks if p not in expected):
                other = deepcopy(model)
                for q in (*expected, p):
                    other.set_submodule(at[q].name, networks[q])
                pairs = zip(original, (last_hidden(other, batch) for batch in BATCHES), strict=True)
                pairs = [(a.softmax(0), b.softmax(0)) for one in pairs for a, b in zip(*one, strict=True)]
                values = [jensenshannon(*pair) ** 2 for pair in pairs]
                tried[p] = sum(values) / len(values)
            best = min(tried, key=tried.get)
            expected[best] = tried[best]
        plan = CondensingPlan(at, networks, {}, 1, 2, searched=True)
        found = search_layers(model, plan, BATCHES, lambda position: nullcontext(networks[position]))
    assert list(found) == list(expected) and found == pytest.approx(expected, rel=1e-4)
    assert same_state(before, state_of(model))


def test_layers_are_chosen_by_what_they_change():
    """Where one layer's experts give nothing, it is the first to be condensed, and changes nothing."""
    model = tiny.make_model("qwen3_moe", num_hidden_layers=3)
    with torch.no_grad():
        find_moe_layers(model)[1].experts.down_proj.zero_()
        before = model(**BATCHES[0]).logits
        found = condense_layers(model, BATCHES, 1, 2)
        assert found[0].layer == 1 and found[0].divergence < 1e-9
        torch.testing.assert_close(model(**BATCHES[0]).logits, before)


def test_the_refit_lowers_the_error():
    """On enough tokens; the error is that of the tokens held out."""
    batches = [padded_batch([60] * 10, "left", seed=n) for n in range(0, 60, 10)]
    plain, refitted = (
        condense_layers(make_model("deepseek_v3"), batches, 2, 2, refit=refit) for refit in (False, True)
    )
    assert [layer.layer for layer in refitted] == [1, 2]
    for before, after in zip(plain, refitted, strict=True):
        assert (before.winner, after.winner) == ("condensed", "condensed+refit")
        assert before.retained == after.retained and before.errors["condensed"] == after.errors["condensed"]
        assert after.errors["condensed+refit"] < 0.9 * before.errors["condensed"]


@pytest.mark.parametrize(
    ("family", "numbers", "message"),
    [
        (
            "mixtral",
            (1, 2),
            "mixtral cannot say that a layer is dense.*method='cd_moe' with num_experts=2",
        ),
        ("qwen2_moe", (1, 2), "its block also has shared_expert_gate.weight"),
        ("gpt_oss", (1, 2), "cannot say"),
        ("laguna", (1, TOP_K), "other dense layers of this model have 48 neurons, .* keep fewer experts"),
        ("qwen3_moe", (3, 2), "3 layers are to become dense, but the model has 2 MoE layers; give 1 to 2"),
        ("qwen3_moe", (1, 0), "num_experts=0, .* 8 routed experts, and no shared ones; give 1 to 8"),
        ("deepseek_v3", (1, 9), "num_experts=9, .* 8 routed experts; give 0 to 8"),
    ],
)
def test_refused(family, numbers, message, monkeypatch):
    """With the reason, before the model runs."""
    model = make_model(family)
    before = state_of(model)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        condense_layers(model, BATCHES, *numbers)
    assert same_state(before, state_of(model))


def test_blocks_that_scale_their_shared_experts():
    """Are found out by what they return, and the model stays as it was."""
    model = make_model("deepseek_v3")
    before = state_of(model)
    shared = find_moe_layers(model)[0].block.shared_experts
    shared.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="does not add the output of its shared experts as it is"):
        condense_layers(model, BATCHES, 1, 2)
    assert same_state(before, state_of(model)) and model.config.first_k_dense_replace == 1


ANY = """qwen3_moe qwen3_vl_moe qwen3_omni_moe_thinker mellum mimo_v2_flash deepseek_v32 deepseek_ocr2 glm4_moe_lite
    glm_moe_dsa glm5_next kimi_linear exaone_moe hy_v3 hy_v4 laguna step3p7""".split()
FIRST = "deepseek_v2 deepseek_v3 kimi_k25 dots1 glm4_moe glm4v_moe mistral4 ernie4_5_moe afmoe".split()


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_every_family(family):
    """Condensed as the documentation lists them, or refused; never anything else."""
    model = make_model(family)
    if family not in ANY + FIRST:
        with pytest.raises(ValueError, match=r"cannot (say|become|be compressed)"):
            condense_layers(model, BATCHES, 1, 1)
        return
    at = layers_by_position(model, find_moe_layers(model))
    assert possible_layers(at) == (sorted(at) if family in ANY else [min(at)])
    (found,) = condense_layers(model, BATCHES, 1, 1)
    assert found.layer not in layers_by_position(model, find_moe_layers(model))
    described = build_like(model, model.config)  # as its config says, so that plain transformers loads it
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (model, described)]
    assert {name: shapes[1][name] for name in shapes[0]} == shapes[0]
