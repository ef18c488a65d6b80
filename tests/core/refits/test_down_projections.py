"""Refit of the down projections: parity, the joint optimum, and what stays."""

import logging

import pytest
import torch
from reference import (
    reference_features,
    reference_joint_refit,
    reference_layer_output,
    reference_objective,
    reference_refit,
)
from samples import (
    KINDS,
    TOLERANCE,
    activation,
    assert_near,
    assert_unchanged,
    copies,
    in_chunks,
    make_routing,
    make_segments,
    reference_arguments,
    scalar_activation,
)

from optimum_dern.core.layer import mixture
from optimum_dern.core.layer.workspace import Workspace
from optimum_dern.core.refits.down_projections import refit_down


def problem(kind="gated", dtype=torch.float64, tokens=24, unused=()):
    """A layer of three experts, its tokens, and a random target."""
    segments = make_segments(kind, experts=3, width=3, hidden=3, output=2, dtype=dtype)
    routing = make_routing(experts=3, tokens=tokens, hidden=3, dtype=dtype, unused=unused)
    target = torch.randn(tokens, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    return segments, routing, target


def refit(segments, routing, target, activation, ridge, sweeps=3):
    """The layer refitted with one ridge."""
    return next(refit_down(segments, routing, target, activation, [ridge], sweeps))


def reference_problem(segments, routing, target):
    """The same as features, down projections and the part of the target that they have to explain."""
    act = scalar_activation(segments)
    features = reference_features(segments.gate, segments.up, *routing[:3], act, segments.biased)
    (*positional, _), named = reference_arguments(segments, routing)
    positional[2] = torch.zeros_like(segments.down)
    offset = reference_layer_output(*positional, act, **named)  # what the output biases give
    return features, segments.down.double(), target.double() - offset


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_refit_matches_the_reference(kind, dtype, sweeps):
    """New down projections after some sweeps; all else and every input stays."""
    segments, routing, target = given_arguments = problem(kind, dtype)
    before = copies(segments, routing, [target])
    actual = refit(*given_arguments, activation, ridge=0.1, sweeps=sweeps)
    expected = reference_refit(*reference_problem(*given_arguments), 0.1, sweeps)
    assert actual.down.dtype == dtype
    assert_near(actual.down, expected, TOLERANCE[dtype])
    assert_unchanged(before, segments, routing, [target])
    assert not torch.equal(actual.down, segments.down)
    assert [name for name, part in actual._asdict().items() if part is not getattr(segments, name)] == ["down"]


@pytest.mark.parametrize("kind", KINDS)
def test_many_sweeps_reach_the_joint_solution(kind):
    """Block-coordinate descent converges to the one minimum of the whole penalised problem."""
    given_arguments = problem(kind)
    actual = refit(*given_arguments, activation, ridge=0.5, sweeps=120)
    expected = reference_joint_refit(*reference_problem(*given_arguments), 0.5)
    assert_near(actual.down, expected, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_no_sweep_raises_the_objective(kind, ridge):
    """The penalised error never increases, never falls below the joint minimum, and the first sweep lowers it."""
    given_arguments = problem(kind)
    features, start, target = reference_problem(*given_arguments)
    downs = [start] + [refit(*given_arguments, activation, ridge, sweeps=n).down for n in range(1, 6)]
    values = [reference_objective(features, down, start, target, ridge) for down in downs]
    joint = reference_joint_refit(features, start, target, ridge)
    minimum = reference_objective(features, joint, start, target, ridge)
    assert values[1] < 0.99 * values[0]
    for earlier, later in zip(values, values[1:], strict=False):
        assert minimum - 1e-10 <= later <= earlier + 1e-10


def test_known_weights_are_found_again():
    """A target made by other down projections is explained by them when the ridge hardly counts."""
    segments, routing, _ = problem(tokens=60)
    other = make_segments(experts=3, width=3, hidden=3, output=2, seed=9).down
    target = mixture.routed_output(segments._replace(down=other), routing, activation)
    actual = refit(segments, routing, target, activation, ridge=1e-12, sweeps=200)
    assert_near(actual.down, other, 1e-6)


def test_perfect_layer_stays():
    """A target that the layer already gives moves nothing beyond rounding, biases included."""
    segments, routing, _ = problem("biased")
    target = mixture.routed_output(segments, routing, activation)
    assert_near(refit(segments, routing, target, activation, ridge=0.01).down, segments.down, 1e-12)


def test_strong_ridge_keeps_the_old_weights():
    """With a growing ridge the solution goes to the old weights."""
    segments, routing, target = problem()
    far, near = ((refit(segments, routing, target, activation, r).down - segments.down).norm() for r in (1, 1e8))
    assert near < 1e-6 and far > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_expert_without_tokens_is_untouched(kind):
    """No token, or only tokens of weight zero: the down projection stays bit for bit, the others move."""
    segments, routing, target = problem(kind)
    silent = routing._replace(weight=torch.where(routing.index == 2, 0.0, routing.weight))
    for case, unused in ((problem(kind, unused=[0])[1], 0), (problem(kind, unused=[2])[1], 2), (silent, 2)):
        actual = refit(segments, case, target, activation, ridge=0.01).down
        for expert in range(3):
            assert torch.equal(actual[expert], segments.down[expert]) is (expert == unused)


def test_singular_system_keeps_the_old_weights(caplog):
    """Two equal neurons and a ridge below rounding: the expert stays, and a warning says so."""
    segments = make_segments("plain", experts=1, width=2, hidden=1, output=2)
    segments = segments._replace(up=torch.ones_like(segments.up))
    routing = make_routing(experts=1, tokens=1, top_k=1, hidden=1)
    routing = routing._replace(hidden=torch.ones_like(routing.hidden), weight=torch.ones_like(routing.weight))
    with caplog.at_level(logging.WARNING):
        actual = refit(segments, routing, torch.ones(1, 2).double(), activation, ridge=1e-30)
    assert torch.equal(actual.down, segments.down)
    assert "experts [0]: singular refit system" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    """The solution does not depend on the chunk length, nor on whether neurons are kept in memory."""
    given_arguments = problem(kind)
    whole = refit(*given_arguments, activation, ridge=0.1).down
    segments, *rest = given_arguments
    assert_near(refit(in_chunks(segments, 3), *rest, activation, ridge=0.1).down, whole, 1e-10)
    frugal = segments._replace(workspace=Workspace(max_elements=0))
    assert_near(refit(frugal, *rest, activation, ridge=0.1).down, whole, 1e-10)


@pytest.mark.parametrize("kept", [True, False])
def test_neurons_are_kept_only_where_they_fit(kept):
    """Neurons are computed once if they fit in memory; if not, once more and twice in each sweep, for all ridges."""
    (segments, *rest), calls = problem(), []

    def counted(gate, up):
        calls.append(len(up))
        return activation(gate, up)

    segments = segments._replace(workspace=Workspace(max_elements=24 * 2 * 3 - (not kept)))  # tokens, slots, neurons
    refitted = list(refit_down(segments, *rest, counted, [0.1, 1.0], sweeps=2))
    assert sum(calls) == 24 * 2 * (1 if kept else 1 + 2 * 2)
    for ridge, found in zip((0.1, 1.0), refitted, strict=True):
        assert torch.equal(found.down, refit(segments, *rest, activation, ridge, sweeps=2).down)


@pytest.mark.parametrize(("ridge", "sweeps"), [(0.0, 3), (-1.0, 3), (float("nan"), 3), (0.01, 0)])
def test_impossible_options(ridge, sweeps):
    """A ridge or a number of sweeps that is not positive is refused."""
    with pytest.raises(ValueError, match="refit needs ridge > 0 and sweeps >= 1"):
        refit(*problem(), activation, ridge=ridge, sweeps=sweeps)
