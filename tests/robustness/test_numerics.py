"""Layers at the edge of what numbers can say: results are finite, by every method, criterion and preset."""

import math

import pytest
import torch
from tiny import compress, make_model, random_tokens, state_of

from optimum_dern.core.criteria.registry import CRITERIA
from optimum_dern.methods import METHODS
from optimum_dern.options import PRESETS


def blocks(model):
    """The MoE blocks of a tiny model."""
    return [layer.mlp for layer in model.model.layers]


def duplicate(model):
    """All experts are the first one."""
    for block in blocks(model):
        for weight in block.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))


def zero_neurons(model):
    """Half of the neurons of every expert do nothing, and two experts have no other."""
    for block in blocks(model):
        up, down = block.experts.gate_up_proj, block.experts.down_proj
        half = down.shape[2] // 2
        up[:, :half], up[:, 2 * half : 3 * half], down[:, :, :half] = 0, 0, 0
        up[2:4], down[2:4] = 0, 0


def subnormal(model):
    """Experts whose squared norms are zero in float32, and whose products are subnormal."""
    for block in blocks(model):
        for weight in block.experts.parameters():
            weight.mul_(1e-22)


def large(model):
    """Experts whose outputs have squares near the end of float32."""
    for block in blocks(model):
        block.experts.down_proj.mul_(1e15)


def ties(model):
    """A router that likes all experts equally."""
    for block in blocks(model):
        block.gate.weight.zero_()


def never_routed(model):
    """Half of the experts are never chosen: their logits are those of the others, less a little."""
    for block in blocks(model):
        block.gate.weight[4:] = block.gate.weight[:4]
        block.gate.weight[:4] *= 1.001
        block.gate.weight[4:] = 0


CASES = {  # what is done to the model, the calibration data, and options of the model
    "plain": (None, random_tokens(), {}),
    "one token": (None, [{"input_ids": [7]}], {}),
    "one token a sequence": (None, [{"input_ids": [token]} for token in range(9)], {}),
    "constant": (None, [{"input_ids": [7] * 24}] * 5, {}),
    "few tokens": (None, random_tokens(2, 3), {}),
    "duplicate experts": (duplicate, random_tokens(), {}),
    "zero neurons": (zero_neurons, random_tokens(), {}),
    "subnormal": (subnormal, random_tokens(), {}),
    "large": (large, random_tokens(), {}),
    "ties": (ties, random_tokens(), {}),
    "never routed": (never_routed, random_tokens(), {}),
    "one expert a token": (None, random_tokens(), {"num_experts_per_tok": 1}),
}


REFUSED = {  # by method or criterion and case: there is nothing to go by
    ("cd_moe", "one expert a token"): "needs at least 2",
    ("greedy", "one token"): "follows no known rule",  # the only token is held out
}


def compressed(case, **fields):
    """A model after compression, and its report."""
    change, dataset, options = CASES[case]
    model = make_model("mixtral", **options)
    if change is not None:
        with torch.no_grad():
            change(model)
    experts = model.config.num_experts_per_tok if fields.get("method") == "cd_moe" else 2 if options else 4
    return model, compress(model, dataset=dataset, num_experts=experts, batch_size=None, **fields).report


def check(model, report):
    """Weights, outputs and everything reported are finite."""
    assert all(tensor.isfinite().all() for tensor in state_of(model).values())
    with torch.no_grad():
        assert model(torch.arange(24).unsqueeze(0)).logits.isfinite().all()
    for layer in report.layers:
        assert all(map(math.isfinite, (*layer.load, *layer.saliency, layer.largest_output, *layer.errors.values())))
        assert min(layer.errors.values(), default=0) >= 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"mone"}))  # which needs biases, as gpt-oss has them
def test_methods(method, case):
    if (method, case) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method, case]):
            compressed(case, method=method, preset="fast")
        return
    check(*compressed(case, method=method, preset="fast"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, guard, case):
    """Without the guard, too, which would set a fit that went wrong aside."""
    check(*compressed(case, preset=preset, recombine=True, guard=guard))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria(criterion, case):
    if (criterion, case) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[criterion, case]):
            compressed(case, method="prune", preset="fast", selection=criterion)
        return
    check(*compressed(case, method="prune", preset="fast", selection=criterion))


TOLERANCE = 1e-5  # of a tensor's largest entry: sums of other orders, nothing else


@pytest.mark.parametrize(
    "fields", [*({"method": m} for m in METHODS if m != "mone"), *({"preset": p} for p in PRESETS)], ids=str
)
def test_threads(fields):
    """One thread or two: the same experts and candidates, and weights that differ by rounding only."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(compressed("plain", **{"preset": "fast"} | fields))
    finally:
        torch.set_num_threads(before)
    (one, first), (other, second) = ((state_of(model), report.layers) for model, report in found)
    assert [(layer.retained, layer.winner) for layer in first] == [(layer.retained, layer.winner) for layer in second]
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= TOLERANCE * tensor.abs().max()
