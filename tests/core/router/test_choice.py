"""Rules of routers, recognised from what they do, and what they then do without some experts."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from observed import routed_layer
from reference import reference_route
from samples import assert_near

from optimum_dern.core.router.choice import RouterChoice, choose_experts, recognise_choice
from optimum_dern.core.router.rule import RouterRule


BIAS = [0.4, -0.3, 0.2, 0.0, -0.5, 0.3, 0.1, -0.2]
GROUPS = {"groups": 4, "topk_group": 2}
RULES = {
    "softmax of the chosen": {"phi": "exp", "over_all": False, "scale": 1.0},
    "softmax of all": {"phi": "exp", "over_all": True, "scale": 0.5},
    "sigmoid": {"phi": "sigmoid", "over_all": False, "scale": 2.0},
    "corrected sigmoid": {"phi": "sigmoid", "over_all": False, "scale": 1.0, "by": "sigmoid", "bias": BIAS},
    "corrected softmax": {"phi": "exp", "over_all": False, "scale": 1.0, "by": "exp", "bias": BIAS},
    "groups by their best two": {
        **GROUPS,
        "phi": "sigmoid",
        "over_all": False,
        "scale": 1.0,
        "by": "sigmoid",
        "bias": BIAS,
    },
    "groups by their best": {**GROUPS, "phi": "exp", "over_all": True, "scale": 1.0, "by": "exp", "best": 1},
}


@pytest.mark.parametrize("name", RULES)
def test_what_a_router_would_do_without_some_experts(name):
    """A rule recognised from tokens routes them as the reference does once experts 1, 4 and 6 are gone."""
    rules = RULES[name]
    layer, logits = routed_layer(experts=8, tokens=60, **rules)
    choice, own_logits = recognise_choice(layer, layer.routing)
    assert_near(own_logits, logits, 1e-5)
    allowed = [0, 2, 3, 5, 7]
    dropped = torch.tensor([i not in allowed for i in range(8)])
    index, weight = choose_experts(logits.masked_fill(dropped, -torch.inf), choice, 2)
    route = partial(reference_route, top_k=2, **rules)
    for token, z in enumerate(logits.tolist()):
        experts, weights = route(z, allowed)
        expected = dict(zip(experts, weights, strict=True))
        actual = dict(zip(index[token].tolist(), weight[token].tolist(), strict=True))
        assert actual.keys() == expected.keys()
        assert_near(torch.tensor([actual[i] for i in experts]).double(), weights, 1e-5)


def test_experts_that_may_not_be_chosen_weigh_nothing():
    """Where fewer than k experts are left in the chosen group, the rest of the k weigh 0."""
    layer, logits = routed_layer(experts=8, tokens=60, **RULES["groups by their best two"])
    choice, _ = recognise_choice(layer, layer.routing)
    dropped = torch.arange(8) != 3
    index, weight = choose_experts(logits.masked_fill(dropped, -torch.inf), choice, 2)
    assert_near(weight[index == 3], torch.ones(60), 1e-6)
    assert weight[index != 3].abs().max() == 0


def test_a_group_without_experts_is_never_open():
    """Not even where all others are judged below zero."""
    choice = RouterChoice(RouterRule("exp", False, 1.0), num_groups=2, topk_group=1)
    gone = -torch.inf
    index, weight = choose_experts(torch.tensor([[gone, gone, -1.0, -2.0], [-1.0, -2.0, gone, gone]]), choice, 2)
    assert index.tolist() == [[2, 3], [0, 1]]
    assert_near(weight, torch.tensor([[-1.0, -2.0]] * 2).softmax(1), 1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: {"router_rows": None}, "it is no matrix"),
        (lambda layer: {"router_rows": layer.router_rows[:, :2]}, "it is no matrix"),
        (lambda layer: {"routing": layer.routing._replace(weighs_input=True)}, "it is no matrix"),
        (lambda layer: {"routing": layer.routing._replace(weight=layer.routing.weight**2)}, "its weights are neither"),
        (
            lambda layer: {
                "routing": layer.routing._replace(weight=torch.full((60, 1), 1.0), index=torch.zeros(60, 1).long())
            },
            "it does not choose",
        ),
    ],
)
def test_other_routers_are_refused(change, reason):
    """A router that follows none of the rules is named with what it does otherwise, and what to use instead."""
    layer, _ = routed_layer(experts=8, tokens=60, **RULES["softmax of the chosen"])
    layer = replace(layer, **change(layer))
    with pytest.raises(ValueError, match=f"selection='greedy'.*{reason}.*another selection"):
        recognise_choice(layer, layer.routing)
