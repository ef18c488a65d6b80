"""The neuron refit against a dense Gauss-Newton step whose Jacobian autograd computes."""

import pytest
import torch
from samples import KINDS, activation, assert_near, assert_unchanged, copies, make_routing, make_segments

from optimum_dern.core.mixture import routed_output
from optimum_dern.core.neuron_refit import refit_neurons


def problem(kind, seed=0):
    """A small layer, its tokens, and a target near its output."""
    segments, routing = make_segments(kind, seed=seed), make_routing(tokens=30)
    target = routed_output(segments, routing, activation)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(5), dtype=target.dtype)
    return segments, routing, target + 0.2 * noise


def flat_parts(segments):
    """Gate (where there is one) and up projections as one vector."""
    return torch.cat([part.flatten() for part in segments[:2] if part is not None])


def with_parts(segments, flat):
    """The inverse of `flat_parts`."""
    if segments.gate is None:
        return segments._replace(up=flat.view_as(segments.up))
    gate, up = flat.chunk(2)
    return segments._replace(gate=gate.view_as(segments.gate), up=up.view_as(segments.up))


@pytest.mark.parametrize("kind", KINDS)
def test_step_solves_the_normal_equations(kind):
    """The step equals (J^T J + lambda I)^-1 J^T r, lambda relative to the mean diagonal of J^T J."""
    segments, routing, target = problem(kind)
    flat, ridge = flat_parts(segments), 0.1

    def output(values):
        return routed_output(with_parts(segments, values), routing, activation).flatten()

    jacobian = torch.autograd.functional.jacobian(output, flat)
    normal = jacobian.T @ jacobian
    penalty = ridge * normal.diagonal().mean() * torch.eye(len(flat), dtype=flat.dtype)
    step = torch.linalg.solve(normal + penalty, jacobian.T @ (target.flatten() - output(flat)))

    found = refit_neurons(segments, routing, target, activation, ridge, iterations=500, tolerance=1e-12)
    assert_near(flat_parts(found) - flat, step, 1e-7)
    assert found.down is segments.down


def test_step_lowers_the_error():
    """A few iterations already bring the output nearer to the target."""
    segments, routing, target = problem("gated")
    found = refit_neurons(segments, routing, target, activation, ridge=0.1)
    before = (routed_output(segments, routing, activation) - target).norm()
    assert (routed_output(found, routing, activation) - target).norm() < 0.9 * before


def test_chunks_change_nothing(monkeypatch):
    """Tokens in chunks of three give the same step."""
    segments, routing, target = problem("gated")
    whole = refit_neurons(segments, routing, target, activation, 0.1)
    monkeypatch.setattr("optimum_dern.core.mixture.CHUNK_TOKENS", 3)
    assert_near(flat_parts(refit_neurons(segments, routing, target, activation, 0.1)), flat_parts(whole))


def test_memory_bound_changes_nothing(monkeypatch):
    """Recomputing the linearisation in every iteration, where it does not fit, gives the same step."""
    segments, routing, target = problem("gated")
    whole = refit_neurons(segments, routing, target, activation, 0.1)
    monkeypatch.setattr("optimum_dern.core.neuron_refit.MAX_ELEMENTS", 0)
    assert_near(flat_parts(refit_neurons(segments, routing, target, activation, 0.1)), flat_parts(whole))


def test_experts_without_tokens_and_inputs_stay():
    """An expert that no token reaches keeps its bits, and nothing is modified in place."""
    segments, routing = make_segments("gated"), make_routing(tokens=30, unused=(2,))
    target = routed_output(segments, routing, activation) + 1.0
    before = copies(segments, routing)
    found = refit_neurons(segments, routing, target, activation, 0.1)
    assert torch.equal(found.up[2], segments.up[2]) and torch.equal(found.gate[2], segments.gate[2])
    assert not torch.equal(found.up[0], segments.up[0])
    assert_unchanged(before, segments, routing)


def test_nothing_to_fit():
    """Tokens of weight zero leave everything as it is."""
    segments, routing, target = problem("gated")
    silent = routing._replace(weight=torch.zeros_like(routing.weight))
    assert refit_neurons(segments, silent, target, activation, 0.1) is segments
