"""Narrower experts: the same in memory and from disk, in a checkpoint that plain transformers loads."""

import json

import pytest
import torch
from families import FAMILIES, make_config, make_model, model_class, runnable
from safetensors.torch import load_file
from tiny import compress, random_tokens, same_state

from optimum_dern import DernCompressor
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.width import resolve_width, width_settings


# Families whose config has no key that sizes nothing but the routed experts, and what it sizes beside them.
SIZES_OTHERS = {
    "deepseek_v4": "shared_experts",
    "hunyuan_v1_moe": "shared_mlp",
    "cohere2_moe": "mlp",
    "llama4_text": "shared_expert",
    "llama4": "shared_expert",
}
IN_MEMORY_ONLY = ("diffusion_gemma",)  # two stacks share its experts
WITHOUT_GRADIENTS = ("diffusion_gemma",)  # and it does not predict the next token


def config_for(family, **options):
    importance = "camera_p" if family in WITHOUT_GRADIENTS else "heapr"
    return {"method": importance, "preset": "fast", "self_share": 0.0, "dataset": random_tokens(8)} | options


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in runnable(FAMILIES) if f.values[0] not in SIZES_OTHERS])
def test_every_family(family, tmp_path):
    """Half as wide and half as many, in one pass: in memory, from disk, and loaded by plain transformers."""
    model = make_model(family)
    before = find_moe_layers(model)[0]
    width = before.width // 8 * 4
    options = config_for(family, width=width, num_experts=4)
    model.save_pretrained(tmp_path / "source")
    compressor = DernCompressor(**options)
    compressor.compress_model(model)
    if family in IN_MEMORY_ONLY:
        compressor.save(model, tmp_path / "narrow")
    else:
        DernCompressor(**options).compress_checkpoint(tmp_path / "source", tmp_path / "narrow")
    loaded = type(model).from_pretrained(tmp_path / "narrow").eval()
    layer = find_moe_layers(loaded)[0]
    assert (layer.width, layer.num_experts) == (width, 4)
    assert compressor.report.after.width == width
    assert same_state(model.state_dict(), loaded.state_dict())
    if family in WITHOUT_GRADIENTS:  # what it predicts is drawn
        return
    ids = torch.stack([row["input_ids"].flatten() for row in random_tokens(2)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("family", [f for f in runnable(SIZES_OTHERS) if f.values[0] != "llama4"])
def test_families_whose_width_sizes_others(family):
    model = make_model(family)
    with pytest.raises(ValueError, match=rf"also sizes others, such as model\.\S*\.{SIZES_OTHERS[family]}\."):
        compress(model, method="camera_p", width=find_moe_layers(model)[0].width // 2)


@pytest.mark.parametrize("method", ["heapr", "camera_p", "slim"])
def test_all_experts_stay(method):
    """With a width alone, in all layers and in their order."""
    model = make_model("deepseek_v3")
    report = compress(model, num_experts=None, method=method, width_sparsity=0.5).report
    assert (report.after.experts, report.after.width) == (8, 8)
    assert report.config["sparsity"] == 0.0
    assert all(layer.retained == list(range(8)) for layer in report.layers)


def test_shared_experts_keep_their_width():
    model = make_model("deepseek_v3")
    shared = {name: t.clone() for name, t in model.state_dict().items() if "shared" in name}
    compress(model, method="camera_p", width=8)
    assert (model.config.moe_intermediate_size, model.config.n_shared_experts) == (8, 2)
    assert shared and all(torch.equal(model.state_dict()[name], t) for name, t in shared.items())
    with pytest.raises(ValueError, match="choose a width that divides 16"):
        compress(make_model("deepseek_v3"), method="camera_p", width=12)


def test_guard_and_refits():
    """What is written is never worse than plain narrowing on the held-out tokens, and better after refits."""
    report = compress(make_model("qwen3_moe"), method="camera_p", width=8).report
    for layer in report.layers:
        assert layer.errors[layer.winner] <= layer.errors["pruned"]
    assert any(layer.winner != "pruned" for layer in report.layers)


def test_dense_layers_of_the_same_width_are_refused():
    """Jamba's dense layers have the experts' width where there are any."""
    config = make_config("jamba")
    config.expert_layer_period, config.expert_layer_offset = 2, 1
    model = model_class("jamba").from_config(config)
    layers = find_moe_layers(model)
    with pytest.raises(ValueError, match="intermediate_size also sizes others, such as model.layers.0.feed_forward"):
        width_settings(model, layers, 8)


def test_width_of_a_layer():
    layer = find_moe_layers(make_model("mixtral"))[0]
    assert resolve_width(layer, None, None) == 16
    assert resolve_width(layer, 4, None) == 4
    assert resolve_width(layer, None, 0.5) == 8
    assert resolve_width(layer, None, 0.6) == 8  # seven neurons, but rows have blocks of 16 bytes
    assert resolve_width(layer, None, 0.25, 8) == 16
    with pytest.raises(ValueError, match="width=17, but experts have 16 neurons; choose width=1 to 15"):
        resolve_width(layer, 17, None)
    with pytest.raises(ValueError, match="rows of 16 bytes; choose a multiple of 4"):
        resolve_width(layer, 6, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 8, "width_sparsity": 0.5}, "both width=8 and width_sparsity=0.5 are given"),
        ({"width": 8, "method": "hc_smoe"}, "merges experts.*narrower with camera_p, dern, heapr, prune, slim"),
        ({"width": 8, "recombine": True}, "recombine=True makes experts of neurons of others"),
        ({"importance": "heapr", "method": "prune"}, "importance='heapr' has no effect without width or width_spars"),
        ({"width_multiple_of": 8}, "width_multiple_of=8 has no effect"),
        ({"width": 8, "importance": "size"}, "unknown importance of neurons 'size'"),
        ({"importance": "size"}, "unknown importance of neurons 'size'"),  # of dern's segments
        ({"width_sparsity": 1.0}, "above 0 and below 1"),
        ({"width": 0}, "of at least 1"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compress(make_model("mixtral"), **options)


def test_the_config_keeps_its_other_keys(tmp_path):
    """Only the width and the count change in the file."""
    make_model("mixtral").save_pretrained(tmp_path / "source")
    DernCompressor(
        **config_for("mixtral", width=8, num_experts=4, importance=None, method="prune")
    ).compress_checkpoint(tmp_path / "source", tmp_path / "narrow")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "narrow"))
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"intermediate_size", "num_local_experts", "num_experts", "transformers_version"}
    shapes = {name: t.shape for name, t in load_file(tmp_path / "narrow" / "model.safetensors").items()}
    assert shapes["model.layers.0.block_sparse_moe.experts.3.w2.weight"] == (32, 8)
