"""Where dropped segments go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_assignment
from samples import KINDS, PROPERTY, TOLERANCE, assert_near, make_segments

from optimum_dern.core.dern.recombination import assign_segments
from optimum_dern.core.layer.segments import similarity_vectors


AXES = torch.eye(4, dtype=torch.float64)  # unit vectors whose cosines are exactly 0 or 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weights", [(0, 1, 1), (1, 2, 0.5)])
@pytest.mark.parametrize("alpha", [-1.0, 0.5, 0.8])
def test_assignment_matches_the_reference(kind, dtype, weights, alpha):
    """Destination and best similarity of every segment of four dropped experts."""
    segments = make_segments(kind, width=4, dtype=dtype)
    retained, dropped = [1, 4], [0, 2, 3, 5]
    vectors = similarity_vectors(segments, weights)
    saved = vectors.clone()
    destination, similarity = assign_segments(vectors[dropped].flatten(0, 1), vectors[retained], alpha)
    expected, best = reference_assignment(*segments[:3], retained, alpha, weights)
    assert destination.view(4, 4).tolist() == expected
    assert destination.dtype == torch.int64 and similarity.dtype == dtype
    assert_near(similarity.view(4, 4), best, TOLERANCE[dtype])
    assert torch.equal(vectors, saved)


@st.composite
def axis_cases(draw):
    """Dropped and retained segments that are all axes: many exact ties."""
    axis = st.integers(0, 3)
    width = draw(st.integers(1, 3))
    experts = draw(st.lists(st.lists(axis, min_size=width, max_size=width), min_size=1, max_size=4))
    return draw(st.lists(axis, min_size=1, max_size=6)), experts


@PROPERTY
@given(axis_cases(), st.sampled_from([-0.5, 0.0, 0.5, 1.0]))
def test_ties_go_to_the_lower_index(case, alpha):
    """A segment goes to the first retained expert that holds its axis, and to the first of all if none does."""
    dropped, experts = case
    destination, similarity = assign_segments(AXES[dropped], AXES[torch.tensor(experts)], alpha)
    for axis, where, best in zip(dropped, destination.tolist(), similarity.tolist(), strict=True):
        holders = [i for i, axes in enumerate(experts) if axis in axes]
        assert best == float(bool(holders))
        assert where == ((holders or [0])[0] if best > alpha else -1)


@PROPERTY
@given(st.integers(0, 1000), st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), st.floats(-1, 1))
def test_assignment_properties(seed, dropped, experts, width, alpha):
    """The best cosine is the largest there is, its expert holds it, and alpha decides who moves."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(dropped + experts * width, 3, generator=generator, dtype=torch.float64)
    points = torch.nn.functional.normalize(points, dim=1)
    left, right = points[:dropped], points[dropped:].view(experts, width, 3)
    destination, similarity = assign_segments(left, right, alpha)
    free, _ = assign_segments(left, right, -2.0)
    for point, where, anyway, best in zip(left, destination.tolist(), free.tolist(), similarity.tolist(), strict=True):
        cosines = [max(float(point @ other) for other in expert) for expert in right]
        assert abs(max(cosines) - best) < 1e-12 and abs(cosines[anyway] - best) < 1e-12
        assert where == (anyway if best > alpha else -1)


@pytest.mark.parametrize("max_elements", [1, 3, 7, 100])
def test_blocks_change_nothing(max_elements):
    """The bound on memory changes neither destinations nor cosines."""
    vectors = similarity_vectors(make_segments(), (0, 1, 1))
    dropped, retained = vectors[[0, 2, 3, 5]].flatten(0, 1), vectors[[1, 4]]
    destination, similarity = assign_segments(dropped, retained, 0.5)
    blocked, cosines = assign_segments(dropped, retained, 0.5, max_elements)
    assert torch.equal(blocked, destination)
    assert_near(cosines, similarity, 1e-14)
    assert len(destination.unique()) == 3  # both experts and the discarded ones occur


def test_threshold_is_strict():
    """A cosine equal to alpha does not move a segment, one above it does."""
    assert assign_segments(AXES[:1], AXES[None, :1], 1.0)[0].tolist() == [-1]
    assert assign_segments(AXES[:1], AXES[None, :1], 0.999)[0].tolist() == [0]
    assert assign_segments(AXES[:1], AXES[None, 1:2], 0.0)[0].tolist() == [-1]
    assert assign_segments(AXES[:1], AXES[None, 1:2], -0.001)[0].tolist() == [0]


def test_nothing_dropped():
    """No dropped segments give empty answers."""
    destination, similarity = assign_segments(AXES[:0], AXES[None], 0.5)
    assert destination.shape == similarity.shape == (0,) and destination.dtype == torch.int64
