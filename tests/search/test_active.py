"""Another number of active experts: what a model with such a config computes, for one thread, and back again."""

import threading

import pytest
import torch
from families import FAMILIES, make_config, make_model, runnable
from tiny import make_model as tiny_model

from optimum_dern.engine.measure.recording import record_routing
from optimum_dern.models.moe.structure import TOP_K_KEYS, find_moe_layers
from optimum_dern.search import active_experts


FIXED = {"phimoe": "chooses 2 experts whatever it is told"}
WEIGHS_INPUT = ("llama4_text", "llama4")
DRAWN = ("diffusion_gemma",)  # what it predicts is drawn
IDS = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in runnable(FAMILIES) if f.values[0] not in FIXED])
def test_as_a_model_with_that_config(family):
    """Without correction it is, to the bit, the model that its config with this number makes; afterwards as before."""
    model, config = make_model(family).eval(), make_config(family)
    part = find_moe_layers(model)[0].config
    nested = config if part is model.config else config.get_text_config()
    key = next(key for key in TOP_K_KEYS if getattr(part, key, None) is not None)
    value = getattr(nested, key)
    setattr(nested, key, [3] * len(value) if isinstance(value, list) else 3)
    if family in DRAWN:
        with active_experts(model, 3):
            return
    other = type(model)._from_config(config).eval()
    other.load_state_dict(model.state_dict())
    before = logits(model)
    with active_experts(model, 3, correct_scale=False):
        changed = logits(model)
    assert torch.equal(changed, logits(other)) and not torch.equal(changed, before)
    with active_experts(model, find_moe_layers(model)[0].top_k):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "dots1", "jamba", "gemma4_text", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_scale_stays(family, count):
    """Every token's weights have the sum that the trained number gives, and the proportions of the router's own."""
    model = make_model(family).eval()
    layer = find_moe_layers(model)[0]

    def routing():
        with record_routing(layer.block, layer.experts) as record:
            logits(model)
        return record.routings[0]

    trained = routing()
    seen = []
    with active_experts(model, {position_of(model, layer): count}):
        handle = layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1:3]))
        logits(model)
        handle.remove()
    with active_experts(model, {position_of(model, layer): count}, correct_scale=False):
        plain = routing()
    index, weight = seen[-1]  # the first is of the router with its trained number
    assert torch.equal(index, plain.index) and index.shape[1] == count
    for token in range(len(index)):
        expected = [w / sum(plain.weight[token].tolist()) for w in plain.weight[token].tolist()]
        total = sum(trained.weight[token].tolist())
        torch.testing.assert_close(weight[token], total * torch.tensor(expected), rtol=1e-4, atol=1e-6)


def position_of(model, layer):
    return next(i for i, decoder in enumerate(layers_of(model)) if layer.block in decoder.modules())


def layers_of(model):
    return model.model.layers


def test_by_layer():
    """A list has a number for each MoE layer; a map leaves the others alone."""
    model = tiny_model("mixtral").eval()
    found = []
    for count in ([1, 4], {1: 4}, 5):
        with active_experts(model, count):
            handles = [
                layer.experts.register_forward_pre_hook(lambda module, args: found.append(args[1].shape[1]))
                for layer in find_moe_layers(model)
            ]
            logits(model)
            for handle in handles:
                handle.remove()
    assert found == [1, 4, 2, 4, 5, 5]


def test_two_threads_at_once():
    """Each gets what it gets alone, and classes, hooks and attributes are back at the end."""
    model = tiny_model("olmoe").eval()
    classes = [type(module) for module in model.modules()]
    alone = {}
    for count in (1, 2, 4):
        with active_experts(model, count):
            alone[count] = logits(model)
    barrier, wrong = threading.Barrier(3), []

    def run(count):
        barrier.wait()
        for _ in range(10):
            with active_experts(model, count):
                if not torch.equal(logits(model), alone[count]):
                    wrong.append(count)

    threads = [threading.Thread(target=run, args=(count,)) for count in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_contexts_nest_and_end_with_errors():
    model = tiny_model("mixtral").eval()
    before = logits(model)
    with active_experts(model, 4):
        four = logits(model)
        with pytest.raises(RuntimeError), active_experts(model, 1):
            assert not torch.equal(logits(model), four)
            raise RuntimeError
        assert torch.equal(logits(model), four)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("family", "count", "message"),
    [
        ("mixtral", 0, "0 active experts in .*can choose 1 to 8"),
        ("mixtral", 9, "can choose 1 to 8"),
        ("deepseek_v3", 5, "can choose 1 to 4"),
        ("mixtral", [1], "1 numbers of active experts for 2 MoE layers"),
        ("mixtral", {7: 1}, r"layers \[7\] have no experts"),
        ("phimoe", 3, FIXED["phimoe"]),
        ("llama4_text", 3, "scale the experts' inputs"),
    ],
)
def test_refused(family, count, message):
    model = make_model(family)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message), active_experts(model, count):
        pass
    assert [type(module) for module in model.modules()] == classes
