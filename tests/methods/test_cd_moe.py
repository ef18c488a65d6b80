"""CD-MoE: the condensed layer is a fixed sum of experts, in a checkpoint that plain transformers runs."""

import pytest
import torch
from families import make_model
from tiny import compress, random_tokens

from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.moe.view import layer_activation, read_layer


# With weights normalised over the chosen experts, over all, by sigmoid, with a logit bias, and with biased experts.
FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "minimax_m2", "glm4_moe", "gpt_oss", "granitemoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_gets_the_same_sum(family):
    """The block gives sum over S of w_i e_i(x), with w_i the mean gate weight of the original router's tokens."""
    model, original = make_model(family).eval(), make_model(family).eval()
    before = find_moe_layers(original)[0]
    routed = []
    handle = before.experts.register_forward_pre_hook(lambda module, args: routed.append(args[:3]))
    rows = random_tokens(8)
    with torch.no_grad():
        for row in rows:
            original(input_ids=row["input_ids"].view(1, -1))
    handle.remove()
    report = compress(model, num_experts=2, method="cd_moe", preset="paper", dataset=rows).report
    layer, kept = find_moe_layers(model)[0], report.layers[0].retained
    assert report.layers[0].winner == "condensed" and (layer.num_experts, layer.top_k) == (2, 2)
    index, weight = torch.cat([r[1] for r in routed]), torch.cat([r[2] for r in routed])
    segments, activation = read_layer(before).segments, layer_activation(before)
    tokens, found = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), []
    handle = layer.experts.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        layer.block(tokens.view(1, 5, 32))
    handle.remove()
    inputs = torch.cat([tokens, torch.ones(5, 1)], 1) if segments.biased else tokens
    expected = torch.zeros(5, 32)
    for expert in kept:
        gate, up = (None if part is None else inputs @ part[expert].T for part in segments[:2])
        output = activation(gate, up) @ segments.down[expert]
        if segments.output_bias is not None:
            output = output + segments.output_bias[expert]
        expected += weight[index == expert].mean() * output
    torch.testing.assert_close(found[0].view(5, 32), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("mixtral", {"num_experts": 4}, "give num_experts=2"),
        ("deepseek_v3", {"num_experts": 4}, "give num_experts=2"),
        ("mixtral", {"num_experts": 2, "width": 8}, "merges experts"),
    ],
)
def test_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        compress(make_model(family), method="cd_moe", **options)


def test_refits_help():
    """The condensed layer is fitted like any other."""
    report = compress(make_model("mixtral"), num_experts=2, method="cd_moe").report
    for layer in report.layers:
        assert layer.errors[layer.winner] < layer.errors["condensed"]
