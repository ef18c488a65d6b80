"""MoNE: what the dropped experts add on average goes into output biases, where a family has them."""

import pytest
import torch
from families import make_model
from tiny import compress, random_tokens

from optimum_dern.models.moe.structure import find_moe_layers


def test_the_constant():
    """The bias of every retained expert grows by the mean contribution of the dropped ones, measured by hooks."""
    model, rows = make_model("gpt_oss"), random_tokens(6)
    layer = find_moe_layers(model)[0]
    experts, calls = layer.experts, []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args[:3]))
    with torch.no_grad():
        for row in rows:
            model.eval()(input_ids=row["input_ids"].view(1, -1))
    handle.remove()
    bias = experts.down_proj_bias.detach().clone()
    outputs = torch.zeros(8, 32, dtype=torch.float64)
    tokens = 0
    with torch.no_grad():
        for hidden, index, weight in calls:
            tokens += len(index)
            for expert in range(8):
                one = torch.where(index == expert, weight, 0.0)
                outputs[expert] += experts(hidden, index, one).flatten(0, -2).double().sum(0)
    report = compress(model, method="mone", preset="paper", dataset=rows).report
    kept = report.layers[0].retained
    assert report.layers[0].winner == "novices" and report.config["selection"] == "mone"
    frequency = [sum(int((index == e).any(1).sum()) for _, index, _ in calls) for e in range(8)]
    gate = [sum(weight[index == e].sum().item() for _, index, weight in calls) / tokens for e in range(8)]
    unweighted = torch.zeros(8, 32, dtype=torch.float64)
    fresh = make_model("gpt_oss")
    own = find_moe_layers(fresh)[0].experts
    with torch.no_grad():
        for hidden, index, _ in calls:
            for expert in range(8):
                ones = (index == expert).float()
                unweighted[expert] += own(hidden, index, ones).flatten(0, -2).double().sum(0)
    lost = sum(gate[e] * unweighted[e] / max(1, frequency[e]) for e in range(8) if e not in kept) / sum(gate)
    found = find_moe_layers(model)[0].experts.down_proj_bias.detach()
    torch.testing.assert_close(found, bias[kept] + lost.float(), rtol=1e-3, atol=1e-5)


def test_refused_without_output_biases():
    with pytest.raises(ValueError, match="have none; choose method='prune' with selection='mone'"):
        compress(make_model("mixtral"), method="mone")


def test_biases_are_refitted():
    """Also by the default, after the other closed forms, where the guard finds that it helps."""
    names = [name for layer in compress(make_model("gpt_oss")).report.layers for name in layer.errors]
    assert any(name.endswith("bias") for name in names)
    names = [name for layer in compress(make_model("mixtral")).report.layers for name in layer.errors]
    assert not any("bias" in name for name in names)
