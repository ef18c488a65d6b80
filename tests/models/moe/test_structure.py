"""What the structural adapter finds, reads, writes and predicts, family by family."""

import pytest
import torch
from tiny import EXPERTS, FAMILIES, FIRST_MOE, HIDDEN, TOP_K, WIDTH, make_config, make_model, random_tokens, state_of

from optimum_dern import DernCompressor
from optimum_dern.core.layer.mixture import Routing, routed_output
from optimum_dern.core.layer.segments import ExpertLayout
from optimum_dern.models.moe.structure import find_decoder_layers, find_moe_layers
from optimum_dern.models.moe.view import layer_activation, read_layer, retained_routing, write_counts_, write_layer_
from optimum_dern.models.size import measure_model, predict_size
from optimum_dern.models.skeleton import build_skeleton


ROUTING = {"deepseek_v3": [("gate.weight", True), ("gate.e_score_correction_bias", False)]}
COUNT_KEY = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_local_experts",
    "olmoe": "num_experts",
    "deepseek_v3": "n_routed_experts",
}
USUAL_ROUTING = [("gate.weight", True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_find_moe_layers(family):
    """Every MoE block, in order, with its numbers; dense layers and shared experts are left out."""
    model = make_model(family)
    layers = find_moe_layers(model)
    first = FIRST_MOE.get(family, 0)
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp" for i in range(first, len(model.model.layers))]
    for layer in layers:
        assert layer.block is model.get_submodule(layer.name)
        assert layer.experts is layer.block.experts
        assert layer.config is model.config
        assert layer.layout == ExpertLayout()
        assert (layer.num_experts, layer.top_k) == (EXPERTS, TOP_K)
        assert (layer.num_groups, layer.topk_group) == ((2, 1) if family == "deepseek_v3" else (1, 1))
        assert [(r.path, r.is_parameter) for r in layer.routing] == ROUTING.get(family, USUAL_ROUTING)
        assert all(r.dim == 0 and len(r.tensor) == EXPERTS for r in layer.routing)
        assert layer.router_weight.tensor is layer.block.gate.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_find_decoder_layers(family):
    """The list of layers that the engine walks, dense ones included."""
    model = make_model(family)
    assert find_decoder_layers(model, find_moe_layers(model)[0]) == ("model.layers", model.model.layers)


def test_dense_models_have_no_moe_layers():
    """A feed-forward block is no expert."""
    assert find_moe_layers(torch.nn.Sequential(torch.nn.Linear(4, 4))) == []


@pytest.mark.parametrize(("family", "dim"), [("qwen2_moe", "shared_expert_intermediate_size"), ("mixtral", None)])
def test_sizes_that_equal_the_expert_count(family, dim):
    """Widths that happen to equal the number of experts are not taken for the expert dimension."""
    same = {"intermediate_size": EXPERTS} if dim is None else {dim: EXPERTS, "moe_intermediate_size": EXPERTS}
    model = make_model(family, **same)
    assert [r.path for layer in find_moe_layers(model) for r in layer.routing] == ["gate.weight"] * 2
    DernCompressor(num_experts=4, dataset=random_tokens()).compress_model(model)
    shared = [name for name in model.state_dict() if "shared_expert." in name]
    assert all(EXPERTS in model.state_dict()[name].shape for name in shared)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (4, HIDDEN, EXPERTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_read_and_write_round_trip(family, dtype):
    """Writing what was read changes no bit and no output."""
    model = make_model(family).to(dtype)
    before = state_of(model)
    ids = random_tokens(1)[0]["input_ids"].unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
        for layer in find_moe_layers(model):
            old = layer.experts.gate_up_proj
            write_layer_(layer, read_layer(layer))
            assert layer.experts.gate_up_proj is not old
        assert torch.equal(model(ids).logits, expected)
    after = state_of(model)
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mathematics_is_the_models(family):
    """Segments, activation and routed sum reproduce the output of the model's own experts."""
    model = make_model(family)
    layer = find_moe_layers(model)[0]
    seen = []
    handle = layer.experts.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    with torch.no_grad():
        model(random_tokens(1)[0]["input_ids"].unsqueeze(0))
    handle.remove()
    (args, output), segments = seen[0], read_layer(layer).segments
    assert segments.up.shape == (EXPERTS, WIDTH, HIDDEN)
    torch.testing.assert_close(
        routed_output(segments, Routing(*args), layer_activation(layer)), output, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_fewer_experts(family):
    """Every tensor and every count of the block shrinks; a layer may be written several times."""
    model, original = make_model(family), make_model(family)
    layers = find_moe_layers(model)
    for layer in layers:
        weights = read_layer(layer)
        for kept in ([0, 2, 5], [1, 3, 4, 7]):
            retained = torch.tensor(kept)
            routing = retained_routing(layer, weights, retained)
            write_layer_(layer, type(weights)(weights.segments.select(retained), routing))
        source = original.get_submodule(layer.name)
        assert torch.equal(layer.experts.gate_up_proj, source.experts.gate_up_proj[kept])
        assert torch.equal(layer.experts.down_proj, source.experts.down_proj[kept])
        for r in layer.routing:
            assert torch.equal(r.tensor, source.get_submodule("gate").state_dict()[r.name][kept])
        assert layer.experts.num_experts == layer.block.gate.num_experts == 4
    write_counts_(model, layers, 4)
    assert model.config.to_dict()[COUNT_KEY[family]] == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_size(family, dtype):
    """`predict_size` tells beforehand what `measure_model` finds afterwards."""
    model = make_model(family).to(dtype)
    layers = find_moe_layers(model)
    predicted = predict_size(model, layers, 4)
    DernCompressor(num_experts=4, dataset=random_tokens()).compress_model(model)
    measured = measure_model(model, find_moe_layers(model))
    assert predicted == measured
    assert measured.parameters == sum(p.numel() for p in model.parameters())
    assert measured.bytes == measured.parameters * dtype.itemsize
    unused = len(layers) * (4 - TOP_K) * 3 * HIDDEN * WIDTH
    assert measured.active_parameters == measured.parameters - unused


def test_tied_weights_count_once():
    """An output layer that is the embedding has no parameters of its own."""
    tied, untied = (make_model("mixtral", tie_word_embeddings=tie) for tie in (True, False))
    sizes = [measure_model(model, find_moe_layers(model)).parameters for model in (tied, untied)]
    assert sizes[1] - sizes[0] == tied.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton(tmp_path, family):
    """A config alone gives the structure and the sizes of the real model, without storage."""
    make_config(family, tie_word_embeddings=True).save_pretrained(tmp_path)
    skeleton, model = build_skeleton(str(tmp_path)), make_model(family, tie_word_embeddings=True)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    found, expected = find_moe_layers(skeleton), find_moe_layers(model)
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    assert [[r.path for r in layer.routing] for layer in found] == [
        [r.path for r in layer.routing] for layer in expected
    ]
    assert measure_model(skeleton, found) == measure_model(model, expected)
    assert predict_size(skeleton, found, 4) == predict_size(model, expected, 4)


def test_skeleton_takes_the_dtype_of_the_config(tmp_path):
    """Bytes are those of the checkpoint, not of float32."""
    config = make_config("mixtral")
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in build_skeleton(str(tmp_path)).parameters()} == {torch.bfloat16}
