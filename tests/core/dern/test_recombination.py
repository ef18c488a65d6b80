"""One layer of DERN: parity with the slow reference and exact identities."""

import pytest
import torch
from reference import reference_assignment, reference_dern_layer
from samples import (
    KINDS,
    TOLERANCE,
    activation,
    assert_near,
    assert_unchanged,
    copies,
    make_routing,
    make_segments,
    scores_for,
)

from optimum_dern.core.dern.recombination import recombine_layer
from optimum_dern.core.layer.mixture import routed_output


RETAINED = torch.tensor([1, 4])
OPTIONS = {"threshold": 0.2, "init": "own"}


def recombined_output(segments, **options):
    """Output of the recombined layer on tokens routed among the retained experts."""
    result = recombine_layer(segments, RETAINED, scores_for(), **(OPTIONS | options))
    routing = make_routing(experts=2, top_k=2)
    return routed_output(result.segments, routing, activation)


def assert_same_segments(actual, expected):
    """Every part bit for bit."""
    assert actual.biased is expected.biased
    for a, b in zip(actual[:4], expected[:4], strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["own", "gate"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options", [{}, {"weights": (1, 0.5, 2)}, {"importance_weighting": False}, {"iterations": 1}, {"tolerance": 1e9}]
)
def test_layer_matches_the_reference(kind, init, dtype, options):
    """Weights and destinations of both retained experts; biases and inputs stay."""
    segments, saliency = make_segments(kind, width=4, dtype=dtype), scores_for()
    before = [*copies(segments), RETAINED.clone(), saliency.clone()]
    named = {name: value for name, value in options.items() if name != "weights"}
    named["similarity_weights"] = options.get("weights", (0, 1, 1))
    actual = recombine_layer(segments, RETAINED, saliency, threshold=0.5, init=init, **named)
    *expected, destination = reference_dern_layer(*segments[:3], RETAINED, saliency, 0.5, init=init, **options)
    assert torch.equal(actual.destination, destination)
    assert set(destination.unique().tolist()) == {-1, 0, 1}  # the case is a rich one
    for part, value in zip(actual.segments[:3], expected, strict=True):
        assert (part is None and value is None) or part.dtype == dtype
        if value is not None:
            assert_near(part, value, TOLERANCE[dtype])
    if segments.biased:
        assert actual.segments.biased and torch.equal(actual.segments.output_bias, segments.output_bias[RETAINED])
    assert_unchanged(before, segments, [RETAINED, saliency])


@pytest.mark.parametrize("kind", KINDS)
def test_importance_of_neurons_matches_the_reference(kind):
    """Segments weigh by their own importance, over twenty orders of magnitude, and some by nothing."""
    segments, saliency = make_segments(kind, width=4), scores_for()
    neurons = 10 ** (20 * torch.rand(6, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    neurons[[1, 2], [3, 0]] = 0
    actual = recombine_layer(segments, RETAINED, saliency, threshold=0.5, init="own", neurons=neurons)
    *expected, destination = reference_dern_layer(*segments[:3], RETAINED, saliency, 0.5, init="own", neurons=neurons)
    assert torch.equal(actual.destination, destination)
    for part, value in zip(actual.segments[:3], expected, strict=True):
        if value is not None:
            assert_near(part, value)
    with pytest.raises(ValueError, match="NaN or infinity"):
        recombine_layer(segments, RETAINED, saliency, neurons=neurons * torch.inf, **OPTIONS)
    by_experts = recombine_layer(segments, RETAINED, saliency, threshold=0.5, init="own")
    assert not torch.allclose(by_experts.segments.up, actual.segments.up)


def test_reported_similarity_is_the_best_cosine():
    """The similarity of each dropped segment is the reference's, whether it moved or not."""
    segments = make_segments(width=4)
    actual = recombine_layer(segments, RETAINED, scores_for(), threshold=0.5)
    _, expected = reference_assignment(*segments[:3], [1, 4], 0.5)
    assert_near(actual.similarity, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["own", "gate"])
def test_order_of_neurons_does_not_matter(kind, init):
    """Permuting the neurons of every expert, retained or dropped, leaves the compressed function as it was."""
    segments = make_segments(kind)
    orders = [torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    parts = [None if p is None else torch.stack([p[i, o] for i, o in enumerate(orders)]) for p in segments[:3]]
    permuted = segments._replace(gate=parts[0], up=parts[1], down=parts[2])
    assert not torch.equal(permuted.up, segments.up)
    assert_near(recombined_output(permuted, init=init), recombined_output(segments, init=init))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_alpha_above_one_is_pruning(kind, dtype):
    """Nothing moves, even duplicates whose cosine rounding puts above 1: pruning bit for bit."""
    segments = make_segments(kind, dtype=dtype)
    for part in segments[:3]:
        if part is not None:
            part[0], part[2] = part[1], part[4]
    actual = recombine_layer(segments, RETAINED, scores_for(), threshold=1.01)
    assert (actual.destination == -1).all() and actual.destination.shape == (4, 5)
    assert (actual.similarity[:2] > 0.999).all()
    assert_same_segments(actual.segments, segments.select(RETAINED))


@pytest.mark.parametrize("kind", KINDS)
def test_expert_that_receives_nothing_is_untouched(kind):
    """Dropped copies of one retained expert change only that one; the other stays bit for bit."""
    segments = make_segments(kind)
    for part in segments[:3]:
        if part is not None:
            part[[0, 2, 3, 5]] = part[4] * 2.0
    actual = recombine_layer(segments, RETAINED, scores_for(), threshold=0.5, init="gate")
    assert (actual.destination == 1).all()
    before = segments.select(RETAINED)
    for new, old in zip(actual.segments[:3], before[:3], strict=True):
        if old is not None:
            assert torch.equal(new[0], old[0]) and not torch.equal(new[1], old[1])


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_give_back_the_expert(kind):
    """A dropped expert identical to a retained one, neurons in another order, leaves its function alone."""
    segments = make_segments(kind, experts=3)
    for part in segments[:3]:
        if part is not None:
            part[2] = part[1].flip(0)
    retained, routing = torch.tensor([0, 1]), make_routing(experts=2, top_k=2)
    actual = recombine_layer(segments, retained, scores_for(3), threshold=0.9, init="own")
    assert (actual.destination == 1).all()
    expected = routed_output(segments.select(retained), routing, activation)
    assert_near(routed_output(actual.segments, routing, activation), expected)


def test_importance_decides_between_two_neurons():
    """Two neurons of equal norm average to the saliency-weighted mean, or the plain one."""
    segments = make_segments("plain", experts=2, width=1, hidden=2, output=2)._replace(
        up=torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]).double(),
        down=torch.tensor([[[1.0, 1.0]], [[1.0, 1.0]]]).double(),
    )
    for flag, expected in ((True, [0.5, 1.5]), (False, [1.0, 1.0])):
        result = recombine_layer(
            segments, torch.tensor([0]), torch.tensor([1.0, 3.0]), threshold=0.1, importance_weighting=flag
        ).segments
        assert_near(result.up, [[expected]])
        assert_near(result.down, [[[1.0, 1.0]]])


def test_random_start_is_seeded():
    """Random centroids repeat for one seed and differ between seeds."""
    first, again, other = (recombined_output(make_segments(), init="random", seed=s) for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_widths_stay():
    """The layer keeps its neurons per expert whatever moved, and everything is finite."""
    actual = recombine_layer(make_segments(), RETAINED, scores_for(), threshold=-2.0)
    assert (actual.destination >= 0).all()
    assert [tuple(p.shape) for p in actual.segments[:3]] == [(2, 5, 4), (2, 5, 4), (2, 5, 3)]
    assert all(torch.isfinite(part).all() for part in actual.segments[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dropped(kind):
    """A layer that keeps all of its experts is returned bit for bit."""
    segments = make_segments(kind)
    actual = recombine_layer(segments, torch.arange(6), scores_for(), threshold=0.5)
    assert actual.destination.shape == actual.similarity.shape == (0, 5)
    assert_same_segments(actual.segments, segments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"init": "best"}, "unknown cluster_init 'best'"), ({"similarity_weights": (0, 0, 0)}, "similarity weights")],
)
def test_impossible_options(options, message):
    """Errors of the steps reach the caller."""
    with pytest.raises(ValueError, match=message):
        recombine_layer(make_segments(), RETAINED, scores_for(), **(OPTIONS | options))
