"""What every step says that it computes, against what torch counts while it runs."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from observed import observe
from samples import activation, make_routing, make_segments
from torch.utils.flop_counter import FlopCounterMode

from optimum_dern.core.criteria.greedy import greedy, greedy_cost
from optimum_dern.core.criteria.selection import Places
from optimum_dern.core.dern.recombination import recombine_layer, recombine_layer_cost
from optimum_dern.core.layer.cost import LayerShape
from optimum_dern.core.layer.statistics import measure_experts, measure_experts_cost
from optimum_dern.core.merging.all_experts import (
    activation_cosines,
    activation_cosines_cost,
    mean_outputs,
    mean_outputs_cost,
)
from optimum_dern.core.merging.averaging import fit_group_outputs, fit_group_outputs_cost
from optimum_dern.core.merging.grouping import Grouping
from optimum_dern.core.refits.down_projections import refit_down, refit_down_cost
from optimum_dern.core.refits.neurons import count_passes, descend_neurons, descend_neurons_cost
from optimum_dern.core.refits.output_scale import fit_scales, fit_scales_cost
from optimum_dern.core.refits.router import refit_router, refit_router_cost
from optimum_dern.core.router.rule import RouterRule


EXPERTS, WIDTH, SIZE, TOKENS = 6, 48, 40, 400
SHAPE = LayerShape(TOKENS, EXPERTS, EXPERTS, 2, WIDTH, SIZE, SIZE, 3, 8)
SEGMENTS = make_segments(experts=EXPERTS, width=WIDTH, hidden=SIZE, output=SIZE)
ROWS = torch.randn(EXPERTS, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def routed():
    """Tokens as a softmax router over all experts sends them, and a target."""
    hidden = make_routing(experts=EXPERTS, tokens=TOKENS, hidden=SIZE).hidden
    weight, index = (hidden @ ROWS.T).softmax(dim=1).topk(2, dim=1)
    routing = make_routing(experts=EXPERTS, tokens=TOKENS, hidden=SIZE)._replace(index=index, weight=weight)
    return routing, torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def run(name, layer):
    """Run a step; what it says that it computes."""
    routing, target = layer.routing, layer.target
    data = SEGMENTS, routing, target, activation
    if name == "measure":
        measure_experts(SEGMENTS, routing, activation)
        return measure_experts_cost(SHAPE)
    if name == "scale":
        fit_scales(*data)
        return fit_scales_cost(SHAPE)
    if name == "refit":
        list(refit_down(*data, [1e-2, 1e-1], sweeps=2))
        return refit_down_cost(SHAPE, sweeps=2, ridges=2)
    if name == "router":
        refit_router(ROWS, *data, RouterRule("exp", True, 1.0), 1e-2, 20, 0.0)
        return refit_router_cost(SHAPE, 20)
    if name == "neurons":
        next(islice(descend_neurons(*data), count_passes(TOKENS) - 1, None))
        return descend_neurons_cost(SHAPE)
    if name == "recombine":
        recombine_layer(SEGMENTS, torch.arange(3), torch.ones(6), threshold=-1.0, iterations=1)
        return recombine_layer_cost(SHAPE._replace(retained=3), 3)  # of which a third is expected to run
    if name == "greedy":
        greedy(layer, Places(3))
        return greedy_cost(SHAPE)
    if name == "means":
        mean_outputs(layer, routing.hidden)
        return mean_outputs_cost(SHAPE)
    if name == "cosines":
        activation_cosines(layer, routing.hidden, 0, 1)
        return activation_cosines_cost(SHAPE)
    grouping = Grouping(torch.arange(3), torch.arange(6) % 3)
    fit_group_outputs(layer, routing.hidden, grouping, torch.ones(6), SEGMENTS.select(torch.arange(3)))
    return fit_group_outputs_cost(SHAPE._replace(retained=3), TOKENS)


STEPS = ("measure", "scale", "refit", "router", "neurons", "recombine", "greedy", "means", "cosines", "merge")


@pytest.mark.parametrize("name", STEPS)
def test_what_is_said_is_what_is_computed(name):
    """Products of matrices, within a fifth; solving triangular systems is counted by the step alone."""
    routing, target = routed()
    layer = replace(observe(SEGMENTS, routing, ROWS), target=target)
    count = {torch.ops.aten.addmm_: lambda total, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        said = run(name, layer).operations
    if name == "refit":
        said -= 4 * EXPERTS * (2.0 * WIDTH * SHAPE.down + WIDTH**3 / 3)
    assert 0.8 < said / counter.get_total_flops() < 1.25
