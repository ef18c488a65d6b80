"""What earlier compressed layers have changed, and that refits make up for a part of it."""

import copy

import pytest
import torch
from families import FAMILIES as ALL_FAMILIES
from families import make_model as make_family
from tiny import compress, make_model, padded_batch, random_tokens

from optimum_dern.engine.measure.expert_run import measured_experts
from optimum_dern.engine.walk.calls import record_layer_calls
from optimum_dern.engine.walk.drift import Drift, measure_drift
from optimum_dern.engine.walk.stream import HiddenStream
from optimum_dern.models.moe.overrides import takes_routing
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers, layers_by_position


FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3")  # the last two have shared experts
CHANGED_ON_THE_WAY = set(
    "afmoe axk1 cohere2_moe deepseek_v4 diffusion_gemma flex_olmo gemma4 gemma4_text glm5_next hy_v4 llama4 "
    "llama4_text minimax_m3_vl minimax_m3_vl_text nemotron_h qwen4_exp qwen4_exp_text".split()
)
every_family = pytest.mark.parametrize("family", ALL_FAMILIES)
BATCHES = [padded_batch([5, 12, 9], "left", 0), padded_batch([7, 7], "left", 1)]
MASKS = [batch["attention_mask"].bool() for batch in BATCHES]


def changed(model):
    """The same model, its first MoE layer another one."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        find_moe_layers(other)[0].experts.down_proj.mul_(0.5)
    return other


def streams(model, other, position):
    """Hidden states before a layer behind the changed one, and in the original model after it."""
    decoder, before = (find_decoder_layers(m, find_moe_layers(m)[0])[1] for m in (model, other))
    calls = [record_layer_calls(model, decoder, BATCHES) for _ in range(2)]
    behind, original = HiddenStream(calls[0]), HiddenStream(calls[1])
    for number in range(position):
        behind.step(number, before[number])
    for number in range(position + 1):
        original.step(number, decoder[number])
    return behind, original


def drift_at(position, decoder_layer, layer, stream, original):
    """The drift at a layer whose experts are measured in the same run; None where they cannot be."""
    if not takes_routing(layer.experts):
        return None
    with measured_experts(layer, MASKS) as run:
        return measure_drift(position, decoder_layer, layer, stream, original, run, MASKS)


def hidden_states(model):
    """Of every layer in a whole-model forward, real tokens only."""
    with torch.no_grad():
        outputs = [model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states for batch in BATCHES]
    return [torch.cat([h[mask] for h, mask in zip(layer, MASKS, strict=True)]) for layer in zip(*outputs, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_forwards(family):
    """The drift is the difference of two forwards' hidden states, tokens count by the inverse of their size."""
    model = make_model(family, num_hidden_layers=4)
    other, layers = changed(model), find_moe_layers(model)
    position = len(model.model.layers) - len(layers) + 1
    found = drift_at(position, model.model.layers[position], layers[1], *streams(model, other, position))
    wanted, behind = hidden_states(model)[position + 1], hidden_states(other)[position + 1]
    assert (wanted - behind).norm() > 0.01 * wanted.norm()
    torch.testing.assert_close(found.error, wanted - behind, rtol=1e-4, atol=1e-5)
    weight = 1 / wanted.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(found.token_weight, weight / weight.mean(), rtol=1e-4, atol=1e-5)


def test_target_of_some_tokens():
    """Their own output and a share of the drift, times the token's weight; the drift may be in the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(6, 4, generator=generator).bfloat16()
    weight, output = torch.rand(6, 1, generator=generator), torch.randn(3, 4, generator=generator)
    found = Drift(error, weight).goal(0.5).target(output, torch.tensor([4, 0, 5]))
    assert found.dtype == output.dtype
    for row, token in enumerate([4, 0, 5]):
        pairs = zip(output[row].tolist(), error[token].tolist(), strict=True)
        expected = [(own + 0.5 * drift) * weight[token].item() for own, drift in pairs]
        torch.testing.assert_close(found[row], torch.tensor(expected))


def test_an_output_that_is_changed_on_its_way():
    """Nothing can be made up for where the experts' output is scaled before it reaches the stream."""
    model = make_model("mixtral")
    layer = find_moe_layers(model)[1]
    arguments = 1, model.model.layers[1], layer, *streams(model, changed(model), 1)
    assert drift_at(*arguments) is not None
    layer.block.register_forward_hook(lambda module, args, output: 0.5 * output)
    assert drift_at(*arguments) is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_what_is_made_up_for(family):
    """With tokens enough, the last hidden states of new text come nearer to the original model's."""
    model = make_model(family, num_hidden_layers=4)
    text = torch.stack([row["input_ids"] for row in random_tokens(40, seed=7)])
    with torch.no_grad():
        target = model.model(text).last_hidden_state
        errors = []
        for share in (0.0, 0.5):
            smaller = copy.deepcopy(model)
            fields = {"method": "prune", "neuron_refit": False, "drift_correction": share, "batch_size": 20}
            compress(smaller, dataset=random_tokens(200), **fields)
            errors.append((smaller.model(text).last_hidden_state - target).norm())
    assert errors[1] < errors[0]


@every_family
def test_an_unchanged_model_has_none(family):
    """Two walks through one model see the same; families that change the experts' output on its way are known."""
    model = make_family(family)
    layers = find_moe_layers(model)
    decoder = find_decoder_layers(model, layers[0])[1]
    positions = layers_by_position(model, layers)
    stream, original = (HiddenStream(record_layer_calls(model, decoder, BATCHES)) for _ in range(2))
    changing = set()
    for position, decoder_layer in enumerate(decoder):
        original.step(position, decoder_layer)
        if position in positions:
            drift = drift_at(position, decoder_layer, positions[position], stream, original)
            changing.add(drift is None)
            assert drift is None or drift.error.abs().max() <= 1e-6 * original.hidden[0].abs().max()
        stream.step(position, decoder_layer)
    assert changing == {family in CHANGED_ON_THE_WAY}
