"""Importance of neurons against loops in float64, with the matrices that the formulas of the papers have."""

from dataclasses import replace

import pytest
import torch
from reference import reference_neurons
from samples import KINDS, activation, assert_near, in_chunks, make_routing, make_segments, scalar_activation

from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.neurons.importance import IMPORTANCE, check_importance, super_neurons
from optimum_dern.core.neurons.sensitivity import add_weight_gradients_, sensitivity, zero_gradients
from optimum_dern.core.neurons.statistics import NeuronStatistics, measure_neurons


def measured(kind, chunk=5, unused=(4,)):
    """A layer, its routing, a gradient by its output, and the statistics of its neurons in two batches."""
    segments, routing = in_chunks(make_segments(kind), chunk), make_routing(unused=unused)
    gradient = torch.randn(12, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    statistics = NeuronStatistics.zeros(segments)
    for part in (slice(0, 7), slice(7, 12)):
        measure_neurons(statistics, segments, routing.select(part), activation, gradient[part])
    return segments, routing, gradient, statistics


def tokens_of(expert, routing):
    """The tokens routed to an expert, each with its gate weight."""
    found = (routing.index == expert).nonzero().tolist()
    return [(token, routing.weight[token, slot].item()) for token, slot in found]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_against_loops(kind):
    """HEAPr's with an explicit (o, o) Fisher matrix for every token, CAMERA-P's from its definition."""
    segments, routing, gradient, statistics = measured(kind)
    heapr, camera = (IMPORTANCE[name].function(statistics) for name in ("heapr", "camera_p"))
    for expert in range(6):
        found = tokens_of(expert, routing)
        neurons = [
            reference_neurons(
                *segments[:2], expert, routing.hidden[token], scalar_activation(segments), segments.biased
            )
            for token, _ in found
        ]
        for j in range(5):
            w = segments.down[expert, j]
            curvature = 0.0
            for (token, g), h in zip(found, neurons, strict=True):
                q = g * gradient[token]
                curvature += h[j] ** 2 * (w @ torch.outer(q, q) @ w).item()
            assert_near(heapr[expert, j], curvature / max(1, len(found)))
            squares = [(g * h[j]) ** 2 for (_, g), h in zip(found, neurons, strict=True)]
            energy = 0.1 * sum(squares) + 0.9 * max(squares, default=0.0)
            assert_near(camera[expert, j], energy * (w @ w).item())


@pytest.mark.parametrize("kind", KINDS)
def test_sensitivity_against_autograd(kind):
    """The sum of |weight x gradient|, with the gradients of a loss that is linear in the layer's output."""
    segments, routing, gradient, _ = measured(kind)
    gradients = zero_gradients(segments)
    for part in (slice(0, 7), slice(7, 12)):
        add_weight_gradients_(gradients, segments, routing.select(part), activation, gradient[part])
    leaves = [part.clone().requires_grad_() for part in segments.parts]
    *gate, up, down = leaves
    traced = segments._replace(gate=gate[0] if gate else None, up=up, down=down)
    (routed_output(traced, routing, activation) * gradient).sum().backward()
    expected = sum((leaf.detach() * leaf.grad).abs().sum(-1) for leaf in leaves)
    for leaf, found in zip(leaves, gradients, strict=True):
        assert_near(found, leaf.grad)
    assert_near(sensitivity(segments, gradients), expected)


def test_an_expert_without_tokens_scores_zero():
    *_, statistics = measured("gated")
    for name in ("heapr", "camera_p"):
        scores = IMPORTANCE[name].function(statistics)
        assert not scores[4].any() and (scores[[0, 1, 2, 3, 5]] > 0).all()


def test_super_neurons():
    """A neuron whose largest contribution is far above all others', though it is active for one token only."""
    segments, _, _, statistics = measured("gated")
    assert not super_neurons(statistics).any()
    segments.down[3, 2] *= 1e4
    found = super_neurons(replace(statistics, columns=NeuronStatistics.zeros(segments).columns))
    assert found.nonzero().tolist() == [[3, 2]]
    assert not super_neurons(NeuronStatistics.zeros(segments)).any()


def test_unknown_importance():
    with pytest.raises(ValueError, match="unknown importance of neurons 'size'; choose one of camera_p, heapr, slim"):
        check_importance("size")
