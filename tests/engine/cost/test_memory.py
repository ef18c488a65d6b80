"""The predicted peak is what a run takes, and a bound is refused or kept."""

import re
from functools import cache, partial

import pytest
import torch
from live_bytes import LiveBytes
from tiny import make_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.engine.cost.memory import plan_memory
from optimum_dern.methods import METHODS
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.skeleton import build_skeleton
from optimum_dern.options import PRESETS


RUNNING = [method for method in METHODS if method != "mone"]  # which needs output biases
MEASURED = {  # every method and preset, and what takes memory besides
    **{f"{method}, {preset}": {"method": method, "preset": preset} for method in RUNNING for preset in PRESETS},
    "greedy": {"method": "prune", "preset": "paper", "selection": "greedy"},
    "residual": {"method": "prune", "preset": "paper", "selection": "easy_ep"},
    "importance": {"preset": "paper", "importance": "slim"},
    "widths": {"method": "camera_p", "width_budget": "global"},
    "no neurons": {"neuron_refit": False},
    "cd_moe, some layers": {"method": "cd_moe", "condensed_layers": [0]},
    "one shot": {"method": "prune", "calibration_order": "oneshot", "neuron_refit": False},
}


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """Makes a checkpoint with one layer, and little else: of 36 MiB by default."""

    @cache
    def make(hidden=256):
        config = Qwen3MoeConfig(
            vocab_size=128,
            hidden_size=hidden,
            moe_intermediate_size=hidden * 3 // 2,
            num_hidden_layers=1,
            num_experts=32,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            norm_topk_prob=True,
        )
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("one_layer")
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_the_predicted_peak_is_the_measured_one(name, one_layer, tmp_path):
    """From disk to disk, tensors alive at the worst moment: within 15 %."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 128, (64,), generator=generator)} for _ in range(4)]
    condenses = name.startswith("cd_moe")  # its tensors of tokens are predicted with a margin, small in a large layer
    count, source = (2, one_layer(512)) if condenses else (16, one_layer())
    config = DernConfig(num_experts=count, dataset=rows, **MEASURED[name])  # all in one pass
    skeleton = build_skeleton(source)
    predicted = plan_memory(skeleton, find_moe_layers(skeleton), 4 * 64, config, count)
    with LiveBytes() as live:
        DernCompressor(config).compress_checkpoint(source, tmp_path / "out", device="cpu")
    assert 0.85 < (predicted.peak - predicted.interpreter) / live.peak < 1.15


@pytest.mark.parametrize("batch_size", [8, None])
def test_a_forward_pass_is_predicted(batch_size, tmp_path):
    """Where many experts work on each of few tokens, a pass takes most, and smaller batches take less."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(vocab_size=128, num_hidden_layers=1, **sizes, **heads))
    model.save_pretrained(tmp_path / "source")
    rows = [{"input_ids": torch.randint(0, 128, (64,))} for _ in range(128)]
    fields = {"num_experts": 8, "dataset": rows, "batch_size": batch_size, "sequence_length": 64}
    config = DernConfig(**fields, method="prune", preset="paper")
    predicted = plan_memory(model, find_moe_layers(model), 128 * 64, config, 8)
    with LiveBytes() as live:
        DernCompressor(config).compress_checkpoint(tmp_path / "source", tmp_path / "out", device="cpu")
    assert 0.85 < (predicted.peak - predicted.interpreter) / live.peak < 1.15
    assert (live.peak > 25 << 20) == (batch_size is None)


@pytest.fixture(scope="module")
def model():
    """Its sizes are all that counts."""
    return make_model("mixtral")


def plan(model, tokens=1000, bound=None, count=4, device="cpu", **fields):
    """The plan for a config."""
    return plan_memory(model, find_moe_layers(model), tokens, DernConfig(**fields), count, bound, device)


def test_every_step_takes_its_part(model):
    """More tokens, experts and steps take more; the parts add up to the peak."""
    pruned = plan_of_shapes(method="prune", refit=False)
    refitted = plan_of_shapes(method="prune", neuron_refit=False)
    whole = plan_of_shapes(method="prune")
    assert pruned.working < refitted.working < whole.working
    proposed = {"preset": "paper", "method": "dern"}
    assert plan_of_shapes(**proposed).working > plan_of_shapes(**proposed, recombine=False).working
    whole = plan(model, method="prune")
    assert plan(model, tokens=2000).hidden == 2 * plan(model).hidden
    assert plan(model, tokens=2000).working > plan(model).working
    assert whole.peak == whole.interpreter + max(whole.outside, whole.layer + whole.working) + whole.hidden
    assert whole.layer == sum(p.numel() * 4 for p in model.model.layers[0].parameters())


def plan_of_shapes(bound=None, tokens=1 << 12, **fields):
    """The plan for a layer of half a GiB, of which 4 of 64 experts work on a token."""
    config = MixtralConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=1344,
        num_hidden_layers=2,
        num_local_experts=64,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return plan(large, tokens, bound, count=32, **fields)


def test_a_bound():
    """What is fastest within it: hidden states go to a file first, then experts, then blocks get smaller."""
    bounded = partial(plan_of_shapes, neuron_refit=False)
    free = bounded()
    assert free.peak > free.interpreter + free.hidden + free.layer and not free.disk
    assert bounded(free.peak) == free
    spilled = bounded(free.peak - 1)
    assert spilled.spilled and not spilled.experts_in_file and spilled.max_elements == free.max_elements
    assert spilled.peak == free.peak - free.hidden and spilled.disk == free.hidden
    in_file = bounded(spilled.peak - 1)
    assert in_file.spilled and in_file.experts_in_file and in_file.max_elements == free.max_elements
    assert in_file.peak < spilled.peak - free.layer // 2
    assert in_file.disk > in_file.hidden + 1.5 * free.layer
    frugal = bounded(in_file.peak - 1)
    assert frugal.max_elements < in_file.max_elements and frugal.peak < in_file.peak


def test_a_bound_that_cannot_be_kept():
    """The message tells the least that can, and that is kept."""
    with pytest.raises(ValueError, match="this compression needs at least") as refusal:
        plan_of_shapes(1)
    least = float(re.search("at least (.*?) GiB", str(refusal.value))[1])
    assert plan_of_shapes(int((least + 0.01) * 2**30)).experts_in_file
    with pytest.raises(ValueError, match="at least"):
        plan_of_shapes(int((least - 0.01) * 2**30))


def test_a_bound_on_a_gpu():
    """Hidden states may be in a file there, but experts are computed where their memory is."""
    bounded = partial(plan_of_shapes, neuron_refit=False, device="cuda")
    free = bounded()
    spilled = bounded(free.peak - 1)
    assert spilled.spilled and not spilled.experts_in_file
    with pytest.raises(ValueError, match="experts in files need device='cpu', not 'cuda'"):
        bounded(spilled.peak - 1)
