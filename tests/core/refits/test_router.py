"""The router refit against a dense Gauss-Newton step whose Jacobian autograd computes."""

import pytest
import torch
from samples import in_chunks
from torch.nn.functional import silu

from optimum_dern.core.layer.mixture import Routing, routed_output
from optimum_dern.core.layer.segments import Segments
from optimum_dern.core.refits.router import refit_router
from optimum_dern.core.router.rule import RouterRule


EXPERTS, TOKENS, TOP_K, HIDDEN, WIDTH = 5, 40, 2, 6, 4
RULES = [
    RouterRule("exp", False, 1.0),  # softmax over the chosen: Mixtral, Qwen3-MoE
    RouterRule("exp", True, 1.0),  # softmax over all, not renormalised: OLMoE, Qwen2-MoE
    RouterRule("sigmoid", False, 2.5),  # sigmoid, renormalised and scaled: DeepSeek-V3
]


def activation(gate, up):
    return silu(gate) * up


def apply_rule(rows, hidden, index, rule, bias=0.0):
    """Weights (T, k) of given choices, written out with torch so that autograd can differentiate them."""
    phi = torch.exp if rule.phi == "exp" else torch.sigmoid
    values = phi(hidden @ rows.T + bias)  # (T, N)
    chosen = values.gather(1, index)
    return rule.scale * chosen / (values if rule.over_all else chosen).sum(1, keepdim=True)


def layer(rule, seed=0, dtype=torch.float64):
    """A random layer, its router's rows and choices, and a target."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    segments = Segments(normal(EXPERTS, WIDTH, HIDDEN), normal(EXPERTS, WIDTH, HIDDEN), normal(EXPERTS, WIDTH, HIDDEN))
    rows, hidden = normal(EXPERTS, HIDDEN), normal(TOKENS, HIDDEN)
    index = (hidden @ rows.T).topk(TOP_K).indices
    routing = Routing(hidden, index, apply_rule(rows, hidden, index, rule))
    return segments, rows, routing, routed_output(segments, routing, activation) + 0.3 * normal(TOKENS, HIDDEN)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("ridge", "bias"), [(1e-3, None), (0.3, None), (1e-2, [1.0, -0.5, 0.0, 2.0, 0.3])])
def test_step_solves_the_normal_equations(rule, ridge, bias):
    """The step equals (J^T J + lambda I)^-1 J^T r with J from autograd; a bias of the logits stays."""
    segments, rows, routing, target = layer(rule)
    bias = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    added = 0.0 if bias is None else bias
    routing = routing._replace(weight=apply_rule(rows, routing.hidden, routing.index, rule, added))

    def output(flat):
        weight = apply_rule(flat.view_as(rows), routing.hidden, routing.index, rule, added)
        return routed_output(segments, routing._replace(weight=weight), activation).flatten()

    jacobian = torch.autograd.functional.jacobian(output, rows.flatten())  # (T o, N d)
    residual = target.flatten() - output(rows.flatten())
    slope = 1 - (routing.hidden @ rows.T + added).sigmoid() if rule.phi == "sigmoid" else torch.ones(TOKENS, EXPERTS)
    trace = 0.0
    for t in range(TOKENS):
        for slot, expert in enumerate(routing.index[t].tolist()):
            x = routing.hidden[t]
            e = (activation(segments.gate[expert] @ x, segments.up[expert] @ x)) @ segments.down[expert]
            g = routing.weight[t, slot] * slope[t, expert]
            trace += (g**2 * (e @ e) * (x @ x)).item()
    penalty = ridge * trace / rows.numel() * torch.eye(rows.numel(), dtype=torch.float64)
    step = torch.linalg.solve(jacobian.T @ jacobian + penalty, jacobian.T @ residual)

    found = refit_router(rows, segments, routing, target, activation, rule, ridge, 400, 1e-12, bias)
    torch.testing.assert_close(found - rows, step.view_as(rows), rtol=1e-6, atol=1e-9)


def test_chunks_change_nothing():
    """Tokens in chunks of eight give the same step."""
    segments, rows, routing, target = layer(RULES[0])
    whole = refit_router(rows, segments, routing, target, activation, RULES[0], 0.1)
    segments = in_chunks(segments, 4)
    torch.testing.assert_close(refit_router(rows, segments, routing, target, activation, RULES[0], 0.1), whole)


def test_perfect_router_stays():
    """No residual, no step; and the input is not modified."""
    segments, rows, routing, _ = layer(RULES[0])
    before = rows.clone()
    target = routed_output(segments, routing, activation)
    found = refit_router(rows, segments, routing, target, activation, RULES[0], 0.1)
    torch.testing.assert_close(found, rows, rtol=0, atol=1e-12)
    assert torch.equal(rows, before)


def test_step_lowers_the_error():
    """The real, not only the linearised, error falls when a router was disturbed."""
    rule = RULES[0]
    segments, rows, routing, _ = layer(rule)
    target = routed_output(segments, routing, activation)
    generator = torch.Generator().manual_seed(1)
    disturbed = rows + 0.1 * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)

    def error(new):
        weight = apply_rule(new, routing.hidden, routing.index, rule)
        return (routed_output(segments, routing._replace(weight=weight), activation) - target).square().sum()

    start = routing._replace(weight=apply_rule(disturbed, routing.hidden, routing.index, rule))
    found = refit_router(disturbed, segments, start, target, activation, rule, 1e-3)
    assert error(found) < 0.2 * error(disturbed)
