"""The backward pass layer by layer against autograd through the whole model."""

import pytest
import torch
from families import make_model
from torch.nn.functional import cross_entropy, log_softmax, softmax

from optimum_dern.data.batches import pad_batches
from optimum_dern.data.samples import Sample
from optimum_dern.engine.walk.backward import measure_gradients
from optimum_dern.engine.walk.calls import record_layer_calls
from optimum_dern.engine.walk.losses import Loss
from optimum_dern.engine.walk.walks import LayersInMemory
from optimum_dern.machine.processes import ALONE
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers, layers_by_position
from optimum_dern.models.moe.view import layer_activation, read_layer


FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "glm_moe_dsa", "qwen3_next", "nemotron_h"]


def in_float64(family):
    """A model that computes in float64, which the grouped matrix products cannot."""
    model = make_model(family).double().eval()
    model.set_experts_implementation("eager")
    return model


def padded():
    """Two micro-batches, one with padding on the left."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(200, (length,), generator=generator) for length in (9, 12, 12, 12)]
    samples = [Sample(ids, torch.ones_like(ids), "text") for ids in texts]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in pad_batches(samples, None, 2)]


def by_layer(model, layers, batches, of, spill=None):
    """What the package measures."""
    _, decoder = find_decoder_layers(model, layers[0])
    calls = record_layer_calls(model, decoder, batches)
    loss = Loss(batches, [batch["attention_mask"].bool() for batch in batches], of)
    places = layers_by_position(model, layers), calls, loss, LayersInMemory(), ALONE
    return measure_gradients(model, decoder, *places, torch.device("cpu"), spill)


def whole_loss(model, batches, of):
    """The loss of all batches, differentiable, written out sequence by sequence."""
    total = 0.0
    for batch in batches:
        logits = model(**batch, use_cache=False).logits.double()
        for row, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
            row, ids = row[mask.bool()], ids[mask.bool()]
            if of == "next token":
                total = total + cross_entropy(row[:-1], ids[1:], reduction="sum")
                continue
            for position in row:
                top = position.detach().sort(descending=True).indices[:8]
                teacher = softmax(position.detach()[top], 0)
                total = total - (teacher * log_softmax(position, 0)[top]).sum()
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_whole_model(family, tmp_path):
    """Gradients of all weights by autograd: of the neurons, from those of their down projections' scale."""
    model = in_float64(family)
    layers, batches = find_moe_layers(model), padded()
    found = by_layer(model, layers, batches, "teacher")
    in_files = by_layer(model, layers, batches, "teacher", tmp_path)
    parameters = [p for layer in layers for p in layer.experts.parameters(recurse=False)]
    gradients = iter(torch.autograd.grad(whole_loss(model, batches, "teacher"), parameters))
    for position, layer in layers_by_position(model, layers).items():
        before = read_layer(layer).segments
        own = {name: p for name, p in layer.experts._parameters.items() if p is not None}
        products = {name: torch.nn.Parameter(p.detach() * next(gradients)) for name, p in own.items()}
        kept = dict(layer.experts._parameters)
        layer.experts._parameters.update(products)
        expected = sum(part.abs().sum(-1) for part in read_layer(layer).segments.parts)
        layer.experts._parameters.update(kept)
        rounding = 5e-6 if family == "nemotron_h" else 1e-6  # parts of that model compute in float32 always
        torch.testing.assert_close(found[position].sensitivity, expected, rtol=rounding, atol=1e-12)
        assert torch.equal(found[position].sensitivity, in_files[position].sensitivity)
        assert before.up.shape[:2] == expected.shape


def test_curvature_against_the_whole_model():
    """The sum of (dL / ds)^2 over tokens, where s scales a neuron's activation for one token alone."""
    model = in_float64("mixtral")
    layers, batches = find_moe_layers(model), padded()
    found = by_layer(model, layers, batches, "next token")
    outputs = []
    handles = [layer.experts.register_forward_hook(lambda *a: outputs.append((a[1], a[2]))) for layer in layers]
    loss = whole_loss(model, batches, "next token")
    for handle in handles:
        handle.remove()
    pulls = torch.autograd.grad(loss, [output for _, output in outputs])
    for number, layer in enumerate(layers):
        segments, activation = read_layer(layer).segments, layer_activation(layer)
        expected = torch.zeros(segments.up.shape[:2], dtype=torch.float64)
        for batch, mask in enumerate(row["attention_mask"].flatten().bool() for row in batches):
            (hidden, index, weight), _ = outputs[batch * len(layers) + number]
            pull = pulls[batch * len(layers) + number]
            for token in mask.nonzero().flatten().tolist():
                for expert, g in zip(index[token].tolist(), weight[token], strict=True):
                    x = hidden.flatten(0, -2)[token].detach()
                    h = activation((segments.gate[expert] @ x)[None], (segments.up[expert] @ x)[None])[0]
                    q = g.detach() * pull.flatten(0, -2)[token]
                    expected[expert] += (h * (segments.down[expert] @ q)) ** 2
        torch.testing.assert_close(found[number].curvature, expected, rtol=1e-6, atol=1e-12)


def test_paths_beside_the_hidden_states(caplog):
    """Gemma 4's last layers read keys and values of earlier ones: the gradient past them is said to be left out."""
    model = make_model("gemma4_text").eval()
    found = by_layer(model, find_moe_layers(model), padded(), "next token")
    assert all(statistics.curvature.any() for statistics in found.values())
    assert "the gradient leaves these paths out" in caplog.text


def test_nothing_stays_behind():
    """No gradients, hooks or changed weights."""
    model = make_model("mixtral").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_layer(model, find_moe_layers(model), padded(), "next token")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
