"""A layer in the layer-by-layer engine sees exactly what it sees in a whole-model forward."""

import pytest
import torch
from tiny import EXPERTS, FAMILIES, FIRST_MOE, make_model, padded_batch, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.core.layer.statistics import measure_experts
from optimum_dern.data.batches import load_batches
from optimum_dern.engine.measure.recording import record_routing
from optimum_dern.engine.walk import walks
from optimum_dern.engine.walk.calls import Call, record_layer_calls
from optimum_dern.engine.walk.stream import HiddenStream
from optimum_dern.machine.scratch import CopiesInFiles
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers
from optimum_dern.models.moe.view import layer_activation, read_layer


LENGTHS = {"left": [5, 12, 9], "right": [5, 12, 9], "none": [11, 11, 11]}
VIEWS = ("hidden", "index", "weight")


def batches_padded(side):
    """Two micro-batches, the second without padding where the first has some."""
    shapes = [LENGTHS[side], [7, 7]]
    return [padded_batch(lengths, "left" if side == "none" else side, seed) for seed, lengths in enumerate(shapes)]


def whole_model(model, batches):
    """Plain causal forwards with hooks: what enters each decoder layer, each experts module, and what comes out."""
    layers = find_moe_layers(model)
    decoder = find_decoder_layers(model, layers[0])[1]
    entered = {i: [] for i in range(len(decoder))}
    routed = {layer.name: [] for layer in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: entered[i].append(Call.of(args, kwargs).hidden), with_kwargs=True
        )
        for i, layer in enumerate(decoder)
    ]
    handles += [
        layer.experts.register_forward_pre_hook(lambda module, args, name=layer.name: routed[name].append(args))
        for layer in layers
    ]
    with torch.no_grad():
        outputs = [model.model(**batch, use_cache=False).last_hidden_state for batch in batches]
    for handle in handles:
        handle.remove()
    return entered, routed, outputs


def layer_by_layer(model, batches):
    """The same from the engine's own parts."""
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    prefix, decoder = find_decoder_layers(model, next(iter(layers.values())))
    masks = [batch["attention_mask"].bool() for batch in batches]
    stream = HiddenStream(record_layer_calls(model, decoder, batches))
    entered, routed = {}, {}
    for i, decoder_layer in enumerate(decoder):
        entered[i] = list(stream.hidden)
        layer = layers.get(f"{prefix}.{i}.mlp")
        if layer is None:
            stream.step(i, decoder_layer)
        else:
            with record_routing(layer.block, layer.experts, stop=True) as probed:
                stream.probe(i, decoder_layer)
            with record_routing(layer.block, layer.experts) as record:
                stream.step(i, decoder_layer)
            routed[layer.name] = (record.without_padding(masks), probed.without_padding(masks))
    return entered, routed, [model.model.norm(hidden) for hidden in stream.hidden]


def close(value, expected):
    """Equality to 1e-6 with a readable failure."""
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_see_what_the_model_shows_them(family, side):
    """Hidden states, expert indices, weights and the last hidden states, whatever the padding."""
    model, batches = make_model(family), batches_padded(side)
    masks = [batch["attention_mask"].bool() for batch in batches]
    entered, routed, outputs = whole_model(model, batches)
    with torch.no_grad():
        engine_entered, engine_routed, engine_outputs = layer_by_layer(model, batches)
    for i, hidden in entered.items():
        for batch, mask in enumerate(masks):
            close(engine_entered[i][batch][mask], hidden[batch][mask])
    assert len(engine_routed) == len(routed) == model.config.num_hidden_layers - FIRST_MOE.get(family, 0)
    for name, calls in routed.items():
        assert len(calls) == len(batches)
        for position, view in enumerate(VIEWS):
            parts = [
                call[position].view(mask.numel(), -1)[mask.flatten()] for call, mask in zip(calls, masks, strict=True)
            ]
            for seen in engine_routed[name]:
                close(getattr(seen, view), torch.cat(parts))
    for output, expected, mask in zip(engine_outputs, outputs, masks, strict=True):
        close(output[mask], expected[mask])


def test_the_mask_matters():
    """The comparison above can fail: a model that sees the padding, or the future, computes something else."""
    model, batches = make_model("mixtral"), batches_padded("left")
    seen = whole_model(model, batches)[2][0]
    unmasked = whole_model(model, [{"input_ids": batches[0]["input_ids"]}])[2][0]
    mask = batches[0]["attention_mask"].bool()
    assert (seen[mask] - unmasked[mask]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_padding_never_counts(family):
    """A padded batch gives the statistics of its sequences run one by one."""
    model = make_model(family)
    rows = [random_tokens(1, length, seed)[0] for seed, length in enumerate((4, 15, 9, 21))]
    results = []
    for batch_size in (4, 1):
        batches = load_batches(rows, None, batch_size=batch_size)
        assert len(batches) == 4 // batch_size
        routed = layer_by_layer(model, batches)[1]
        results.append({})
        for layer in find_moe_layers(model):
            segments, routing = read_layer(layer).segments, routed[layer.name][0]
            results[-1][layer.name] = measure_experts(segments, routing, layer_activation(layer))[0]
    for name, padded in results[0].items():
        alone = results[1][name]
        assert padded.tokens == alone.tokens == 4 + 15 + 9 + 21
        assert torch.equal(padded.count, alone.count)
        for field in (
            "weight",
            "output_norm",
            "output_norm_squared",
            "weighted_output_norm",
            "output_sum",
            "coactivation",
        ):
            torch.testing.assert_close(getattr(padded, field), getattr(alone, field), atol=1e-4, rtol=1e-4)


@pytest.fixture
def captured(monkeypatch):
    """The routing that every layer is compressed with, by name of the layer."""
    seen = {}
    compress_layer_ = walks.compress_layer_

    def capture(measured, *args):
        seen[measured.layer.name] = measured.routing
        return compress_layer_(measured, *args)

    monkeypatch.setattr(walks, "compress_layer_", capture)
    return seen


def run(family, order):
    """The original model, the compressed one, the batches, and the layers' reports."""
    model, original = make_model(family), make_model(family)
    compressor = DernCompressor(num_experts=4, dataset=random_tokens(10), batch_size=5, calibration_order=order)
    compressor.compress_model(model)
    return original, model, load_batches(random_tokens(10), None, batch_size=5), compressor.report.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_layers_see_the_compressed_ones_before_them(captured, family):
    """The inputs of layer l during calibration are those in the finished model; its own router was the old one."""
    original, model, batches, reports = run(family, "sequential")
    finished, untouched = whole_model(model, batches)[1], whole_model(original, batches)[1]
    assert captured.keys() == finished.keys() == {report.name for report in reports}
    for position, report in enumerate(reports):
        routing = captured[report.name]
        hidden = torch.cat([call[0] for call in finished[report.name]])
        close(routing.hidden, hidden)
        changed = (torch.cat([call[0] for call in untouched[report.name]]) - hidden).abs().max() > 1e-3
        assert changed == (position > 0)  # the first layer has nothing compressed before it
        with torch.no_grad():
            _, weight, index = original.get_submodule(report.name).gate(hidden)
        assert torch.equal(routing.index, index)
        close(routing.weight, weight)
        load = index.flatten().bincount(minlength=EXPERTS) / index.numel()
        assert report.load == pytest.approx(load.tolist())
        assert report.tokens == 240


@pytest.mark.parametrize("family", FAMILIES)
def test_oneshot_layers_see_the_original_model(captured, family):
    """Every layer is calibrated with what it sees in the model as it came."""
    original, _, batches, reports = run(family, "oneshot")
    untouched = whole_model(original, batches)[1]
    for report in reports:
        for position, view in enumerate(VIEWS):
            close(getattr(captured[report.name], view), torch.cat([call[position] for call in untouched[report.name]]))
        layer = next(layer for layer in find_moe_layers(original) if layer.name == report.name)
        statistics, _ = measure_experts(read_layer(layer).segments, captured[report.name], layer_activation(layer))
        assert report.saliency == pytest.approx((statistics.weight / 240).tolist())


def test_hidden_states_in_files_go_to_the_layers_device(tmp_path):
    """They are kept on the CPU, whatever device the layers are on."""
    model = make_model("mixtral")
    calls = record_layer_calls(model, model.model.layers, batches_padded("none"), CopiesInFiles(tmp_path).copy)
    assert {hidden.device.type for hidden in HiddenStream(calls, tmp_path)} == {"cpu"}
    assert {hidden.device.type for hidden in HiddenStream(calls, tmp_path, torch.device("meta"))} == {"meta"}
