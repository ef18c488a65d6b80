"""A router's rule comes back from what it does, in the precision in which it does it."""

from itertools import chain

import pytest
import torch

from optimum_dern.core.layer.mixture import Routing
from optimum_dern.core.router.rule import RouterRule, possible_logits, recognise_rule


RULES = [
    RouterRule("exp", False, 1.0),  # softmax over the chosen: Mixtral, Qwen3-MoE
    RouterRule("exp", True, 1.0),  # softmax over all, not renormalised: OLMoE, Qwen2-MoE
    RouterRule("sigmoid", False, 2.5),  # sigmoid, renormalised and scaled: DeepSeek-V3
]


def routed(rule, dtype=torch.float64, native=True, bias=None, experts=5, tokens=400, spread=1.0):
    """Router rows, and the tokens as a model would send them whose logits are in `dtype`, or in float32."""
    generator = torch.Generator().manual_seed(0)
    rows = (spread * torch.randn(experts, 6, generator=generator)).to(dtype)
    hidden = torch.randn(tokens, 6, generator=generator).to(dtype)
    compute = dtype if native else torch.float32
    logits = torch.nn.functional.linear(hidden.to(compute), rows.to(compute), bias).double()
    values = logits.exp() if rule.phi == "exp" else logits.sigmoid()
    index = logits.topk(2).indices
    chosen = values.gather(1, index)
    weight = rule.scale * chosen / (values if rule.over_all else chosen).sum(1, keepdim=True)
    return rows, Routing(hidden, index, weight.to(dtype))


def found_in(rows, routing, bias=None):
    """The rule for each of the possible logits."""
    return [recognise_rule(logits, routing) for logits in possible_logits(rows, bias, routing)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rule_is_recognised(rule):
    """The rule comes back from what the router does; there is one way to make logits in float64."""
    (found,) = found_in(*routed(rule))
    assert found[:2] == rule[:2]
    assert found.scale == pytest.approx(rule.scale, rel=1e-4)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_logits_as_the_model_rounds_them(rule, native):
    """Large logits in bfloat16 are off by a tenth: only those of the model's own precision show its rule."""
    rows, routing = routed(rule, torch.bfloat16, native, spread=8.0)
    exact, rounded = found_in(rows, routing)
    right, wrong = (rounded, exact) if native else (exact, rounded)
    assert right[:2] == rule[:2] and wrong is None


def test_a_bias_is_added():
    """It belongs to the logits, and without it the rule is not seen."""
    bias = torch.tensor([2.0, -1.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    rows, routing = routed(RULES[0], bias=bias)
    assert found_in(rows, routing, bias)[0][:2] == RULES[0][:2]
    assert found_in(rows, routing) == [None]


def test_a_token_in_a_thousand_does_not_hide_the_rule():
    """Nearly all tokens have to agree, not every one."""
    rows, routing = routed(RULES[0])
    weight = routing.weight.clone()
    weight[0] = 0.5
    assert found_in(rows, routing._replace(weight=weight)) == found_in(rows, routing)
    weight[:8] = 0.5
    assert found_in(rows, routing._replace(weight=weight)) == [None]


def test_unknown_rules_are_left_alone():
    """Even weights, logits of other tokens, a router that reads something else, and one that weighs inputs."""
    rows, routing = routed(RULES[0])
    for other in (
        routing._replace(weight=torch.full_like(routing.weight, 0.5)),
        routing._replace(hidden=routing.hidden.flip(0)),
    ):
        assert found_in(rows, other) == [None]
    nothing = chain(
        possible_logits(rows[:, :3], None, routing), possible_logits(rows, None, routing._replace(weighs_input=True))
    )
    assert list(nothing) == []
