"""Every Mixture-of-Experts family: what calibration records of it, and what is rebuilt from that.

`pytest --family-table FILE tests/test_families.py tests/test_family_checkpoints.py` writes a table of the results.
"""

from contextlib import ExitStack

import pytest
import torch
from families import FAMILIES, make_model, runnable
from tiny import EXPERTS, TOP_K, padded_batch

from optimum_dern.core.layer.mixture import expert_batches, expert_output, routed_output
from optimum_dern.engine.measure.recording import record_routing
from optimum_dern.engine.walk.calls import record_layer_calls
from optimum_dern.engine.walk.stream import HiddenStream
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers, layers_by_position
from optimum_dern.models.moe.view import layer_activation, read_layer


every_family = pytest.mark.parametrize("family", runnable(FAMILIES))


@every_family
def test_recording(family):
    """Layer by layer, experts receive what they receive in a forward pass of the whole model, padding or not."""
    model = make_model(family)
    layers = find_moe_layers(model)
    batches = [padded_batch([24, 9, 17], side) for side in ("left", "right")]
    masks = [batch["attention_mask"].bool().flatten() for batch in batches]
    calls = experts_calls(model, layers, batches)

    _, decoder_layers = find_decoder_layers(model, layers[0])
    positions = layers_by_position(model, layers)
    stream = HiddenStream(record_layer_calls(model, decoder_layers, batches))
    for position, decoder_layer in enumerate(decoder_layers):
        layer = positions.get(position)
        if layer is None:
            stream.step(position, decoder_layer)
            continue
        with record_routing(layer.block, layer.experts, stop=True) as probed:
            stream.probe(position, decoder_layer)
        with record_routing(layer.block, layer.experts) as stepped:
            stream.step(position, decoder_layer)
        for record in (probed, stepped):  # a layer runs several times, and must see the same each time
            for routing, mask, (arguments, _) in zip(record.routings, masks, calls[layer.name], strict=True):
                assert routing.index.shape[1] == layer.top_k == TOP_K
                assert len(routing.index.unique()) > EXPERTS // 2
                received = experts_arguments(routing)
                for found, expected in zip(received, arguments[: len(received)], strict=True):
                    found, expected = real_tokens(found, mask, routing), real_tokens(expected, mask, routing)
                    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@every_family
def test_recording_changes_nothing(family):
    """Logits with recording on, and after it, are those without, to the bit."""
    model = make_model(family)
    layers = find_moe_layers(model)
    batch = padded_batch([24, 9, 17], "left")
    expected = forward(model, batch)
    with ExitStack() as stack:
        records = [stack.enter_context(record_routing(layer.block, layer.experts)) for layer in layers]
        assert torch.equal(forward(model, batch), expected)
    assert torch.equal(forward(model, batch), expected)
    assert [len(record.routings) for record in records] == [1] * len(layers)


@every_family
@torch.no_grad()
def test_rebuild(family):
    """A layer's output is the sum of its experts' contributions, and an expert's is the sum of its neurons'."""
    model = make_model(family)
    batch = padded_batch([13, 24], "right")
    for layer in find_moe_layers(model):
        with record_routing(layer.block, layer.experts) as record:
            calls = experts_calls(model, [layer], [batch])
        (routing,), [(_, output)] = record.routings, calls[layer.name]
        segments, activation = read_layer(layer).segments, layer_activation(layer)
        near = {"atol": 1e-5 * output.abs().max().item(), "rtol": 1e-5}

        total = routed_output(segments, routing, activation)
        torch.testing.assert_close(total, summed(output, routing), **near)
        contributions = torch.stack([contribution(segments, routing, activation, e) for e in range(EXPERTS)])
        torch.testing.assert_close(contributions.sum(0), total, **near)
        for expert, found in enumerate(contributions):
            alone = routing._replace(weight=routing.weight * (routing.index == expert))
            own = summed(layer.experts(*experts_arguments(alone)), routing)
            torch.testing.assert_close(found, own, **near)

        expert, neurons = routing.index.flatten().mode().values.item(), range(segments.up.shape[1])
        bias = segments.output_bias  # the expert's, not each neuron's
        parts = [one_neuron(segments, j, bias if j == 0 or bias is None else torch.zeros_like(bias)) for j in neurons]
        found = sum(contribution(part, routing, activation, expert) for part in parts)
        torch.testing.assert_close(found, contributions[expert], **near)


def test_tied_stacks_are_one():
    """DiffusionGemma runs the same experts on its prompt and on its canvas: they are found once."""
    layers = find_moe_layers(make_model("diffusion_gemma"))
    assert [layer.name for layer in layers] == [f"model.encoder.language_model.layers.{i}" for i in range(4)]
    assert [[twin.name for twin in layer.twins] for layer in layers] == [
        [f"model.decoder.layers.{i}"] for i in range(4)
    ]


def test_several_stacks_are_refused():
    """Nobody knows which of two language models in one is meant."""
    model = torch.nn.ModuleDict({"thinker": make_model("mixtral"), "talker": make_model("mixtral", seed=1)})
    with pytest.raises(ValueError, match="thinker.model.layers, talker.model.layers"):
        layers_by_position(model, find_moe_layers(model))


def experts_calls(model, layers, batches):
    """What each experts module receives and returns in plain forward passes of the whole model."""
    calls = {layer.name: [] for layer in layers}

    def watch(layer):
        def after(module, args, kwargs, output):
            calls[layer.name].append(([*args, *kwargs.values()], output))

        return layer.experts.register_forward_hook(after, with_kwargs=True)

    handles = [watch(layer) for layer in layers]
    for batch in batches:
        forward(model, batch)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def forward(model, batch):
    """Logits; the noise that DiffusionGemma starts from is the same each time."""
    torch.manual_seed(0)
    return model(**batch).logits


def experts_arguments(routing):
    """What a layer's experts are called with."""
    if not routing.weighs_input:
        return routing[:3]
    scores = routing.weight.new_zeros(len(routing.index), EXPERTS).scatter(1, routing.index, routing.weight)  # (T, E)
    return [
        (scores.T.unsqueeze(-1) * routing.hidden).flatten(0, 1)
    ]  # (E T, d): Llama 4 runs all experts on all tokens


def real_tokens(tensor, mask, routing):
    """The rows of real tokens in an argument of an experts module."""
    if routing.weighs_input:  # (E T, d)
        return tensor.unflatten(0, (EXPERTS, -1))[:, mask]
    return tensor.reshape(len(mask), -1)[mask]


def summed(output, routing):
    """The output of an experts module for each token: (T, o)."""
    return output.unflatten(0, (EXPERTS, -1)).sum(0) if routing.weighs_input else output.flatten(0, -2)


def contribution(segments, routing, activation, expert):
    """What one expert adds to the layer's output: (T, o)."""
    total = segments.down.new_zeros(len(routing.hidden), segments.down.shape[-1])
    for batch in expert_batches(segments, routing, activation, [expert]):
        total.index_add_(0, batch.token, batch.weight * expert_output(segments, batch))
    return total


def one_neuron(segments, j, output_bias):
    """Experts that have the j-th of their neurons alone."""
    parts = {name: getattr(segments, name) for name in ("gate", "up", "down")}
    parts = {name: part[:, j : j + 1] for name, part in parts.items() if part is not None}
    return segments._replace(**parts, output_bias=output_bias)
