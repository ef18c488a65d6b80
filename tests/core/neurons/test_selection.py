"""Selection of neurons, and the narrower experts made of them."""

import pytest
import torch
from reference import reference_neurons
from samples import (
    KINDS,
    activation,
    assert_near,
    assert_unchanged,
    copies,
    make_routing,
    make_segments,
    scalar_activation,
)

from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.neurons.selection import PADDING, narrow, retained_width, select_neurons, select_together


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_equals_zeroed_neurons(kind):
    segments, routing = make_segments(kind), make_routing()
    neurons = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(e))[:3] for e in range(6)])
    before, narrower = copies(segments), narrow(segments, neurons)
    zeroed = segments._replace(down=torch.zeros_like(segments.down))
    for expert, kept in enumerate(neurons):
        zeroed.down[expert, kept] = segments.down[expert, kept]
    assert narrower.up.shape[1] == narrower.down.shape[1] == 3
    assert_near(routed_output(narrower, routing, activation), routed_output(zeroed, routing, activation))
    assert_unchanged(before, segments)


def test_all_neurons_are_the_same_experts():
    segments = make_segments()
    same = narrow(segments, torch.arange(5).expand(6, 5))
    assert all(torch.equal(a, b) for a, b in zip(same.parts, segments.parts, strict=True))


def test_selection_by_hand():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert select_neurons(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert select_neurons(scores, 1).tolist() == [[1], [0]]
    protected = torch.tensor([[True, False, False, False], [False, False, True, True]])
    assert select_neurons(scores, 2, protected).tolist() == [[0, 1], [2, 3]]
    assert select_neurons(scores, 1, protected).tolist() == [[0], [2]]
    with pytest.raises(ValueError, match="NaN or infinity"):
        select_neurons(torch.tensor([[1.0, torch.nan]]), 1)


def reference_ranking(scores, count, protected):
    """The neurons kept of each expert, by sorting all of them with their places."""
    places = [(expert, j) for expert in range(len(scores)) for j in range(len(scores[0]))]
    places.sort(key=lambda place: (not protected[place[0]][place[1]], -scores[place[0]][place[1]], place))
    return [sorted(j for expert, j in places[:count] if expert == e) for e in range(len(scores))]


@pytest.mark.parametrize("count", [0, 1, 11, 12, 30])
def test_selection_together_against_a_loop(count):
    """Scores with many ties, an expert that loses everything, and protected neurons of no importance."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(4, (6, 5), generator=generator).double()
    scores[2] = 0
    protected = torch.rand(6, 5, generator=generator) < 0.1
    found = select_together(scores, count, protected)
    expected = reference_ranking(scores.tolist(), count, protected.tolist())
    assert found.tolist() == [row + [PADDING] * (5 - len(row)) for row in expected]
    assert (found != PADDING).sum() == count


def test_selection_together_by_hand():
    scores = torch.tensor([[1.0, 9.0, 5.0], [2.0, 3.0, 4.0]])
    assert select_together(scores, 3).tolist() == [[1, 2, PADDING], [2, PADDING, PADDING]]
    protected = torch.tensor([[True, False, False], [True, False, False]])
    assert select_together(scores, 3, protected).tolist() == [[0, 1, PADDING], [0, PADDING, PADDING]]
    assert select_together(scores, 1, protected).tolist() == [[PADDING] * 3, [0, PADDING, PADDING]]
    with pytest.raises(ValueError, match="NaN or infinity"):
        select_together(torch.tensor([[1.0, torch.inf]]), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_computes_what_ragged_experts_do(kind):
    """Experts of different widths, one of them empty, token by token in float64."""
    segments, routing = make_segments(kind), make_routing()
    kept = [[0, 3], [], [1], [0, 1, 2, 3, 4], [4], [2, 3, 4]]
    padded = narrow(segments, torch.tensor([row + [PADDING] * (5 - len(row)) for row in kept]))
    assert all(not part[e, len(row) :].any() for part in padded.parts for e, row in enumerate(kept))
    expected = torch.zeros(len(routing.hidden), segments.down.shape[-1], dtype=torch.float64)
    for token, (x, experts) in enumerate(zip(routing.hidden, routing.index.tolist(), strict=True)):
        for weight, expert in zip(routing.weight[token].tolist(), experts, strict=True):
            h = reference_neurons(*segments[:2], expert, x, scalar_activation(segments), segments.biased)
            for j in kept[expert]:
                expected[token] += weight * h[j] * segments.down[expert, j]
            if segments.output_bias is not None:
                expected[token] += weight * segments.output_bias[expert]
    assert_near(routed_output(padded, routing, activation), expected)


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple", "kept"),
    [
        (768, 0.25, 1, 576),
        (768, 0.25, 64, 576),
        (768, 0.3, 64, 576),
        (16, 0.99, 1, 1),
        (10, 0.7, 1, 3),
        (10, 0.1, 64, 10),
    ],
)
def test_width(width, sparsity, multiple, kept):
    assert retained_width(width, sparsity, multiple) == kept
