"""The factors of the experts' outputs against a dense least-squares problem."""

import pytest
import torch
from samples import KINDS, activation, assert_near, assert_unchanged, copies, in_chunks, make_routing, make_segments

from optimum_dern.core.layer.mixture import Routing, routed_output
from optimum_dern.core.refits.output_scale import fit_scales, scale_outputs


def contributions(segments, routing):
    """What each expert adds to each token, (N, T, o)."""
    parts = []
    for expert in range(len(segments.up)):
        weight = routing.weight * (routing.index == expert)
        alone = routing._replace(weight=weight)
        parts.append(routed_output(segments, alone, activation))
    return torch.stack(parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [4, 4096])
def test_the_normal_equations(kind, chunk):
    """The factors solve the ridge problem whose columns are the experts' contributions."""
    segments, routing = in_chunks(make_segments(kind), chunk), make_routing(tokens=40)
    target = torch.randn(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = contributions(segments, routing).flatten(1).T  # (T o, N)
    gram = columns.T @ columns
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    expected = 1 + torch.linalg.solve(gram + ridge, columns.T @ (target.flatten() - columns.sum(1)))
    before = copies(segments, routing)
    assert_near(fit_scales(segments, routing, target, activation), expected, 1e-8)
    assert_unchanged(before, segments, routing)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_scaled(kind):
    """An expert returns its factor times what it returned, biases included."""
    segments, routing = make_segments(kind), make_routing()
    scales = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    expected = (scales[:, None, None] * contributions(segments, routing)).sum(0)
    assert_near(routed_output(scale_outputs(segments, scales), routing, activation), expected)


def test_a_router_that_does_not_renormalise():
    """Of a softmax over all experts, dropping some makes the others' weights grow; the factors take that back."""
    segments, generator = make_segments(experts=3), torch.Generator().manual_seed(1)
    hidden, rows = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (200, 3))
    logits = torch.cat([hidden @ rows.T, torch.full((200, 3), -0.5, dtype=torch.float64)], dim=1)
    index = logits[:, :3].topk(2).indices
    full = Routing(hidden, index, logits.softmax(1).gather(1, index))
    sliced = Routing(hidden, index, logits[:, :3].softmax(1).gather(1, index))
    target = routed_output(segments, full, activation)
    scales = fit_scales(segments, sliced, target, activation)
    errors = [
        (routed_output(s, sliced, activation) - target).norm() for s in (segments, scale_outputs(segments, scales))
    ]
    assert (scales < 0.95).all() and errors[1] < 0.6 * errors[0]
    assert_near(fit_scales(segments, full, target, activation), torch.ones(3), 1e-8)


def test_experts_without_tokens_count_as_before():
    """Their factor is 1, as everyone's is where no token is at hand."""
    segments, routing = make_segments(), make_routing(unused=(2,))
    target = 3 * routed_output(segments, routing, activation)
    scales = fit_scales(segments, routing, target, activation)
    assert scales[2] == 1 and (scales[[0, 1, 3, 4, 5]] > 2.5).all()
    assert torch.equal(
        fit_scales(segments, routing.select(slice(0)), target[:0], activation), torch.ones(6, dtype=torch.float64)
    )
