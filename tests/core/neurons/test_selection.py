"""Selection of neurons, and the narrower experts made of them."""

import pytest
import torch
from samples import KINDS, activation, assert_near, assert_unchanged, copies, make_routing, make_segments

from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.neurons.selection import narrow, retained_width, select_neurons


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
