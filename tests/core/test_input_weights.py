"""Layers whose routing weights scale the experts' inputs, so that an expert contributes e(w x) instead of w e(x).

The slow reference knows nothing of that: it gets every slot of a token as a token of its own, scaled beforehand, with
weight one.
"""

import pytest
import torch
from reference import (
    reference_features,
    reference_layer_output,
    reference_refit,
    reference_saliency,
    reference_statistics,
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

from optimum_dern.core.criteria.saliency import man, reap, router
from optimum_dern.core.layer.mixture import Routing, expert_batches, routed_output
from optimum_dern.core.layer.statistics import measure_experts
from optimum_dern.core.refits.down_projections import refit_down
from optimum_dern.core.refits.neurons import descend_neurons
from optimum_dern.core.router.rule import possible_logits


def make_weighted(**fields):
    """Random tokens whose weights scale the experts' inputs."""
    return make_routing(**fields)._replace(weighs_input=True)


def one_slot_a_token(routing):
    """The same work as T k tokens with one expert each, inputs scaled and weights one; float64."""
    hidden, weight = routing.hidden.double(), routing.weight.double()
    scaled = weight[:, :, None] * hidden[:, None, :]  # (T, k, d)
    return Routing(scaled.flatten(0, 1), routing.index.flatten()[:, None], torch.ones(routing.index.numel(), 1))


def reference_output(segments, routing):
    """y(x) = sum of e_i(w_i x), (T, o)."""
    positional, named = reference_arguments(segments, one_slot_a_token(routing))
    return reference_layer_output(*positional, **named).unflatten(0, routing.index.shape).sum(1)


def fit_problem(kind, dtype=torch.float64):
    """A layer, its tokens and a target near its output."""
    segments, routing = make_segments(kind, dtype=dtype), make_weighted(tokens=30, dtype=dtype)
    target = routed_output(segments, routing, activation)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return segments, routing, target + 0.2 * noise.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("top_k", [1, 3])
def test_routed_output(kind, dtype, top_k):
    """The sum of what the chosen experts make of their scaled inputs, biases unscaled; no input is written to."""
    segments, routing = make_segments(kind, dtype=dtype), make_weighted(top_k=top_k, dtype=dtype)
    before = copies(segments, routing)
    actual = routed_output(segments, routing, activation)
    assert actual.dtype == dtype
    assert_near(actual, reference_output(segments, routing), TOLERANCE[dtype])
    assert_unchanged(before, segments, routing)
    unscaled = routed_output(segments, routing._replace(weighs_input=False), activation)
    assert not torch.allclose(actual, unscaled, rtol=1e-2)


def test_segments_set_the_dtype():
    """The product of weight and input is not rounded to the precision of the recording."""
    segments, routing = make_segments(), make_weighted(dtype=torch.bfloat16)
    assert_near(routed_output(segments, routing, activation), reference_output(segments, routing))


def test_chunks():
    """Every slot keeps its own scale in chunks of any length, and outputs are not weighted a second time."""
    segments, routing = make_segments(), make_weighted(tokens=20)
    whole = routed_output(segments, routing, activation)
    segments = in_chunks(segments, 3)
    assert_near(routed_output(segments, routing, activation), whole, 1e-12)
    assert all(bool((batch.weight == 1).all()) for batch in expert_batches(segments, routing, activation))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(kind):
    """e is the output for the scaled input and the whole contribution; the router's score still sees the weight."""
    segments, routing = make_segments(kind), make_weighted(tokens=20, unused=[2])
    actual, routed = measure_experts(segments, routing, activation)
    assert_near(routed, reference_output(segments, routing))

    positional, named = reference_arguments(segments, one_slot_a_token(routing))
    sums = reference_statistics(*positional, **named)
    for name in ("count", "output_norm", "output_norm_squared", "weighted_output_norm", "output_sum"):
        assert_near(getattr(actual, name), sums[name])
    assert actual.tokens == 20

    weight = torch.zeros(20, 6, dtype=torch.float64).scatter_(1, routing.index, routing.weight)
    assert_near(actual.weight, weight.sum(0))
    scores = router(actual)
    assert_near(scores, reference_saliency("router", {**sums, "tokens": 20, "weight": weight.sum(0)}))
    assert_near(reap(actual), man(actual))  # both the mean contribution


def test_coactivation():
    """Co-activation multiplies the norms of two experts' contributions to one token."""
    segments, routing = make_segments(), make_weighted(tokens=1)
    first, second = routing.index[0].tolist()
    alone = [
        reference_output(segments, routing._replace(index=routing.index[:, [slot]], weight=routing.weight[:, [slot]]))
        for slot in (0, 1)
    ]
    statistics, _ = measure_experts(segments, routing, activation)
    assert_near(statistics.coactivation[first, second], alone[0].norm() * alone[1].norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_refit_of_the_down_projections(kind, dtype):
    """The refit solves for neurons of the scaled inputs."""
    segments, routing, target = fit_problem(kind, dtype)
    slots = one_slot_a_token(routing)
    features = reference_features(segments.gate, segments.up, *slots[:3], scalar_activation(segments))
    features = features.unflatten(0, routing.index.shape).sum(1)  # (T, N, f)
    expected = reference_refit(features, segments.down.double(), target.double(), ridge=0.1, sweeps=2)
    (actual,) = refit_down(segments, routing, target, activation, [0.1], sweeps=2)
    assert_near(actual.down, expected, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_refit_of_the_neurons(kind):
    """The same steps as on the slow sum over slots, whose inputs are scaled beforehand."""
    segments, routing, target = fit_problem(kind)
    slots, parts = one_slot_a_token(routing), [part for part in segments[:3] if part is not None]
    parts = [part.clone().requires_grad_() for part in parts]
    *gate, up, down = parts
    changed = segments._replace(gate=gate[0] if gate else None, up=up, down=down)
    output = routed_output(changed, slots, activation).unflatten(0, routing.index.shape).sum(1)
    gradients = torch.autograd.grad((output - target).square().sum() / 2, parts)

    found = next(descend_neurons(segments, routing, target, activation, rate=0.1))  # one step of 0.2 of its length
    for before, after, gradient in zip(
        parts, [part for part in found[:3] if part is not None], gradients, strict=True
    ):
        rows, columns = ((gradient**2).mean(dim, keepdim=True) for dim in (2, 1))
        mean = rows.mean(1, keepdim=True)
        divisor = ((rows / mean).sqrt() + 0.1) * (columns.sqrt() + 0.1 * mean.sqrt())
        assert_near(before - after, 0.2 * 0.1 * before.square().mean().sqrt() * gradient / divisor, 1e-8)


def test_the_router_is_left_alone():
    """Outputs are not linear in such weights, so that the router's refit does not apply, whatever rule they follow."""
    generator = torch.Generator().manual_seed(0)
    rows, hidden = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 40))
    logits, index = (hidden @ rows.T).topk(2)
    routing = Routing(hidden, index, logits.softmax(dim=1))
    assert len(list(possible_logits(rows, None, routing))) == 1
    assert not list(possible_logits(rows, None, routing._replace(weighs_input=True)))
