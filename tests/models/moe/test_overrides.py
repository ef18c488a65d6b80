"""Layers whose experts are not told their routing: Llama 4, from recording to the reloaded checkpoint."""

import pytest
import torch
import transformers
from tiny import (
    COMMON,
    EXPERTS,
    HIDDEN,
    TOP_K,
    WIDTH,
    compress,
    padded_batch,
    random_tokens,
    same_state,
    state_of,
)

from optimum_dern import DernCompressor
from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.layer.segments import ExpertLayout
from optimum_dern.engine.measure.recording import record_routing
from optimum_dern.models.forward import run_until_stopped
from optimum_dern.models.moe.overrides import routing_hook
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.moe.view import layer_activation, read_layer
from optimum_dern.models.refusals import BROKEN


TRANSPOSED = ExpertLayout(transposed=True)
MOE_LAYERS = [1, 3]
TEXT = {
    **COMMON,
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "num_local_experts": EXPERTS,
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": 48,
    "head_dim": 8,
    "attention_chunk_size": 8,  # shorter than the sequences
    "no_rope_layer_interval": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}


def make_llama4(seed=0, vision=False, **overrides):
    """A random Llama 4 whose weights are far from 1 and from one another, and whose experts resemble each other."""
    from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

    text = {**TEXT, **overrides}
    config = Llama4Config(text_config=text, vision_config=VISION) if vision else Llama4TextConfig(**text)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = (Llama4ForConditionalGeneration if vision else Llama4ForCausalLM)(config).float().eval()
        for name, tensor in model.named_parameters():
            if name.endswith("router.weight"):
                tensor.mul_(0.5)
            elif ".feed_forward.experts." in name:
                tensor.mul_(0.7).add_(0.7 * 0.2 * torch.randn_like(tensor[:1]))
    return model


@torch.no_grad()
def routed_part(model, layer, batch):
    """What the experts of one layer add to the output of its block, (T, d), and what the block receives."""
    seen = []
    handle = layer.block.register_forward_hook(lambda block, args, output: seen.append((args[0], output[0])))
    model(**batch)
    handle.remove()
    hidden, output = seen[0]
    hidden = hidden.flatten(0, 1)
    return output - layer.block.shared_expert(hidden), hidden


def test_structure():
    """Llama 4's experts carry no flags: the layout comes from their shapes, the count from the config."""
    layers = find_moe_layers(make_llama4())
    assert [layer.name for layer in layers] == [f"model.layers.{i}.feed_forward" for i in MOE_LAYERS]
    for layer in layers:
        assert layer.layout == TRANSPOSED
        assert (layer.num_experts, layer.top_k, layer.num_groups) == (EXPERTS, TOP_K, 1)
        assert [r.path for r in layer.routing] == ["router.weight"]
        assert read_layer(layer).segments.up.shape == (EXPERTS, WIDTH, HIDDEN)


@pytest.mark.parametrize("width", [HIDDEN // 4, HIDDEN // 2, HIDDEN, 2 * HIDDEN])
def test_layouts_without_flags(width):
    """Experts that do not say how they are stored are told apart by their shapes, whatever their width is."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = make_llama4().config
    values = {"intermediate_size": width, "moe_intermediate_size": width, "expert_ffn_hidden_size": width}
    for name, value in {**values, "n_routed_experts": EXPERTS, "zero_expert_num": 4}.items():
        setattr(config, name, value)
    for experts_class, layout in (
        (Llama4TextExperts, TRANSPOSED),
        (Step3p7Experts, ExpertLayout()),
        (LongcatFlashExperts, ExpertLayout()),
    ):
        experts = experts_class(config)
        assert not hasattr(experts, "is_transposed")
        model = torch.nn.Module()
        model.config, model.block = config, torch.nn.Module()
        model.block.experts = experts
        assert [layer.layout for layer in find_moe_layers(model)] == [layout]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_recorded_routing(top_k, side):
    """Inputs unscaled, sigmoid scores of the best experts, and together with the segments the block's own output."""
    model = make_llama4(num_experts_per_tok=top_k)
    batch = padded_batch([10, 20, 7], side)
    mask = batch["attention_mask"].bool()
    for layer in find_moe_layers(model):
        expected, hidden = (part[mask.flatten()] for part in routed_part(model, layer, batch))
        with torch.no_grad(), record_routing(layer.block, layer.experts) as record:
            model(**batch)
        routing = record.without_padding([mask])
        assert torch.equal(routing.hidden, hidden)
        logits, index = (hidden @ layer.block.router.weight.T).topk(top_k)
        assert torch.equal(routing.index, index)
        torch.testing.assert_close(routing.weight, logits.sigmoid())
        assert routing.weight.std() > 0.05
        actual = routed_output(read_layer(layer).segments, routing, layer_activation(layer))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_recording_stops_before_the_experts_and_cleans_up():
    """With `stop` no expert runs; without, outputs are as ever; no hook is left in either case."""
    model, batch = make_llama4(), padded_batch([10], "left")
    layer, runs = find_moe_layers(model)[0], []
    handle = layer.experts.register_forward_hook(lambda *args: runs.append(args))
    with torch.no_grad():
        expected = model(**batch).logits
        assert len(runs) == 1
        with record_routing(layer.block, layer.experts, stop=True) as record:
            run_until_stopped(model, **batch)
        assert (len(runs), len(record.routings)) == (1, 1)
        with record_routing(layer.block, layer.experts):
            assert torch.equal(model(**batch).logits, expected)
    handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("order", ["sequential", "oneshot"])
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_round_trip(preset, order, tmp_path):
    """Compressed, saved and loaded by plain transformers: the same logits and generation, nothing missing."""
    from transformers import AutoModelForCausalLM

    model = make_llama4()
    compressor = compress(model, preset=preset, calibration_order=order)
    compressor.save(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.num_local_experts == 4
    batch = padded_batch([10, 20, 7], "left", seed=3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-6)
    ids = random_tokens(1)[0]["input_ids"][None]
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))
    for found in find_moe_layers(loaded):
        assert found.layout == TRANSPOSED
        assert found.experts.gate_up_proj.shape == (4, HIDDEN, 2 * WIDTH)
        assert found.block.router.weight.shape == (4, HIDDEN)
        assert found.experts.num_experts == found.block.num_experts == found.block.router.num_experts == 4


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_reported_error_is_the_blocks(top_k):
    """The error of the winner is that of the compressed block itself on the held-out sequences."""
    tokens, original, model = random_tokens(40), *(make_llama4(num_experts_per_tok=top_k) for _ in range(2))
    report = compress(model, dataset=tokens).report.layers[0]
    batch = {"input_ids": torch.stack([tokens[i]["input_ids"] for i in (9, 19, 29, 39)])}
    target, hidden = routed_part(original, find_moe_layers(original)[0], batch)
    output, same = routed_part(model, find_moe_layers(model)[0], batch)
    assert torch.equal(hidden, same)  # the only layer before has no experts
    error = (output - target).square().sum() / target.square().sum()
    assert report.errors[report.winner] == pytest.approx(error.item(), rel=1e-3)
    assert report.errors[report.winner] == min(report.errors.values()) < report.errors["pruned"] < 1


@pytest.mark.skipif(("llama4", transformers.__version__) in BROKEN, reason="refused with this transformers")
def test_images_stay_possible(tmp_path):
    """A model with a vision tower is compressed by its text, and only its language model changes."""
    from transformers import Llama4ForConditionalGeneration

    model = make_llama4(vision=True)
    before = state_of(model)
    compressor = compress(model)
    assert [layer.layer for layer in compressor.report.layers] == MOE_LAYERS
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all(".feed_forward.router." in name or ".feed_forward.experts." in name for name in changed)
    compressor.save(model, tmp_path)
    loaded, info = Llama4ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.text_config.num_local_experts == 4
    batch = padded_batch([10, 20], "left")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-6)


def test_bfloat16():
    """A model in half precision is recorded and compressed in its own dtype."""
    model = make_llama4().bfloat16()
    report = compress(model).report
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(0 < min(layer.errors.values()) < 1 for layer in report.layers)


class MutedExperts(torch.nn.Module):
    """Experts of an unknown kind, which are not told what was chosen."""

    def __init__(self, experts):
        super().__init__()
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, hidden):
        return hidden


def test_experts_without_routing_are_refused():
    """Experts that nobody tells the routing cannot be calibrated; the model stays as it is."""
    model = make_llama4()
    for layer in find_moe_layers(model):
        layer.block.experts = MutedExperts(layer.experts)
        assert routing_hook(layer.block.experts) is None
    before = state_of(model)
    with pytest.raises(ValueError, match=r"MutedExperts\) is not called with indices and weights"):
        DernCompressor(num_experts=4, dataset=random_tokens()).compress_model(model)
    assert same_state(before, state_of(model))
