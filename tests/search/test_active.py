"""Active experts: every family equals the one whose config has the other number, and threads keep theirs apart."""

import threading

import pytest
import torch
from families import FAMILIES, make_config, make_model, model_class, runnable
from tiny import TOP_K, VOCABULARY
from transformers.models.jamba import modeling_jamba

from optimum_dern.models.moe.structure import TOP_K_KEYS, find_moe_layers
from optimum_dern.search.active import active_experts, rescaled, trained_counts


FIXED = {"phimoe": "written for two experts"}
if not hasattr(modeling_jamba, "JambaTopKRouter"):  # the oldest transformers, where the block keeps the number
    FIXED["jamba"] = "keeps no number of experts"
IDS = torch.randint(VOCABULARY - 50, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model):
    """Logits of some tokens; the diffusion model draws the tokens that it starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(input_ids=IDS, use_cache=False)[0]


def reloaded(name, model, k):
    """The same weights in a model whose config has another number of active experts."""
    config = make_config(name)
    inner = config.get_text_config()
    for key in TOP_K_KEYS:
        if getattr(inner, key, None) == TOP_K:
            setattr(inner, key, k)
    cls = model_class(name)
    other = (getattr(cls, "from_config", None) or cls._from_config)(config, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", runnable([name for name in FAMILIES if name not in FIXED]))
def test_equals_a_changed_config(name):
    """To the bit, without the correction; the trained number changes nothing, and nothing is left behind."""
    model, k = make_model(name), 3
    before = run(model)
    with active_experts(model, k, correct_scale=False):
        changed = run(model)
    assert torch.equal(changed, run(reloaded(name, model, k)))
    assert not torch.equal(changed, before)
    with active_experts(model, TOP_K):
        assert torch.equal(run(model), before)
    assert torch.equal(run(model), before)
    assert trained_counts(model) == [TOP_K] * len(find_moe_layers(model))
    assert not any(module._forward_hooks for layer in find_moe_layers(model) for module in layer.block.modules())


@pytest.mark.parametrize("name", FIXED)
def test_fixed_families_are_refused(name):
    """With the reason."""
    with pytest.raises(ValueError, match=FIXED[name]), active_experts(make_model(name), 1):
        pass


def slow_weights(layer, hidden, k, norm):
    """Weights (E,) of one token by a loop, corrected to the sum of the trained number of experts."""
    scores = [float(row.double() @ hidden.double()) for row in layer.router_weight.tensor.detach()]
    scores = [2.718281828459045 ** (score - max(scores)) for score in scores]
    scores = [score / sum(scores) for score in scores]
    order = sorted(range(len(scores)), key=lambda expert: -scores[expert])
    trained = 1.0 if norm else sum(scores[expert] for expert in order[:TOP_K])
    total = sum(scores[expert] for expert in order[:k])
    return {expert: scores[expert] * trained / total for expert in order[:k]}


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize("k", [1, 4])
def test_scale_is_that_of_the_trained_number(name, k):
    """Against a loop in float64, for a router that normalises its weights and one that does not."""
    model = make_model(name)
    layer = find_moe_layers(model)[0]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with active_experts(model, k):
        _, weight, index = layer.block.gate(hidden)
    for token in range(5):
        expected = slow_weights(layer, hidden[token], k, norm=name == "qwen3_moe")
        got = dict(zip(index[token].tolist(), weight[token].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5)


def test_rescaled_without_weight():
    """A token whose experts all have weight zero stays as it is."""
    assert torch.equal(rescaled(torch.zeros(1, 3), torch.zeros(1, 2)), torch.zeros(1, 3))


def test_llama4_rescales_the_inputs():
    """Its router returns a score for every expert, which weighs what the expert reads."""
    layer = find_moe_layers(model := make_model("llama4_text"))[0]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    trained, _ = layer.block.router(hidden)
    with active_experts(model, 4):
        scores, _ = layer.block.router(hidden)
    assert (scores > 0).sum(-1).tolist() == [4] * 5
    assert torch.allclose(scores.sum(-1), trained.sum(-1))


def used(model):
    """Numbers of experts that the layers choose in one forward pass."""
    seen, layers = [], find_moe_layers(model)
    handles = [
        layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[-1])) for layer in layers
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return seen


def test_each_layer_has_its_own():
    """A list has one number for each layer, a dict for those that change; the inner context counts."""
    model = make_model("qwen3_moe")
    with active_experts(model, [1, 5]):
        assert used(model) == [1, 5]
        outer = run(model)
        with active_experts(model, {1: TOP_K}):
            assert used(model) == [TOP_K, TOP_K]
        assert torch.equal(run(model), outer)
    with active_experts(model, {1: 4}):
        assert used(model) == [TOP_K, 4]


def test_a_context_inside_another_corrects_from_the_trained_number():
    """Not from that of the outer one."""
    model = make_model("olmoe")
    with active_experts(model, 4):
        alone = run(model)
    with active_experts(model, 7, correct_scale=False), active_experts(model, 4):
        assert torch.equal(run(model), alone)


@pytest.mark.parametrize(
    ("name", "counts", "message"),
    [
        ("qwen3_moe", 0, "from 1 to 8"),
        ("qwen3_moe", 9, "from 1 to 8"),
        ("deepseek_v3", 5, "from 1 to 4, as many as it has in the 1 of 2 groups"),
        ("qwen3_moe", [2], "for 1 layers, but the model has 2"),
        ("qwen3_moe", {2: 1}, r"layers \[2\], but there are 2"),
    ],
)
def test_impossible_numbers_are_refused(name, counts, message):
    """Before anything is hooked."""
    model = make_model(name)
    with pytest.raises(ValueError, match=message), active_experts(model, counts):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_threads_keep_theirs_apart():
    """Two threads that generate with different numbers on one model write what each writes alone."""
    model, written = make_model("olmoe"), {}

    def write(k, into):
        with active_experts(model, k):
            into[k] = model.generate(IDS, max_new_tokens=24, do_sample=False, eos_token_id=None)

    for k in (1, 2, 5):
        write(k, written)
    assert len({tuple(tokens.flatten().tolist()) for tokens in written.values()}) == 3
    for _ in range(3):
        together = {}
        threads = [threading.Thread(target=write, args=(k, together)) for k in (1, 2, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(together[k], written[k]) for k in written)
