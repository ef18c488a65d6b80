"""Weighted spherical k-means with equalised norms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_kmeans
from samples import PROPERTY, TOLERANCE, assert_near

from optimum_dern.core.dern.clustering import equalised_means, initial_centroids, nearest_direction, spherical_kmeans


def sample(points=14, clusters=4, width=5, dtype=torch.float64, seed=0):
    """Random points, positive weights, and the first points as centroids."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(points, width, generator=generator, dtype=torch.float64).to(dtype)
    return (
        pool,
        (torch.rand(points, generator=generator, dtype=torch.float64) + 0.1).to(dtype),
        pool[:clusters].clone(),
    )


SHAPES = st.tuples(st.integers(4, 10), st.integers(1, 4), st.integers(2, 4), st.integers(0, 1000))


def drawn(shape):
    """The sample of a drawn shape."""
    points, clusters, width, seed = shape
    return sample(points, clusters, width, seed=seed)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("iterations", [1, 2, 30])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_matches_the_reference(dtype, iterations, seed):
    """Centroids and labels, with no input written to."""
    points, weights, start = given_arguments = sample(dtype=dtype, seed=seed)
    saved = [value.clone() for value in given_arguments]
    centroids, labels = spherical_kmeans(points, weights, start, iterations)
    expected, assigned = reference_kmeans(*(v.double().tolist() for v in given_arguments), iterations)
    assert centroids.dtype == dtype and labels.dtype == torch.int64
    assert labels.tolist() == assigned
    assert_near(centroids, expected, TOLERANCE[dtype])
    assert all(torch.equal(old, new) for old, new in zip(saved, given_arguments, strict=True))


@PROPERTY
@given(SHAPES)
def test_labels_are_nearest(shape):
    """After one iteration every point belongs to the starting centroid of largest cosine."""
    points, weights, start = drawn(shape)
    _, labels = spherical_kmeans(points, weights, start, iterations=1)
    for point, label in zip(points, labels.tolist(), strict=True):
        cosines = torch.nn.functional.cosine_similarity(point, start, dim=1)
        assert cosines[label] > cosines.max() - 1e-12


@PROPERTY
@given(SHAPES, st.integers(1, 5))
def test_centroids_average_their_labels(shape, iterations):
    """Whatever the number of iterations, a centroid is the equalised mean of the points labelled with it."""
    points, weights, start = drawn(shape)
    centroids, labels = spherical_kmeans(points, weights, start, iterations, tolerance=0.0)
    for cluster, centroid in enumerate(centroids):
        own = labels == cluster
        if own.any():
            norms = points[own].norm(dim=1, keepdim=True)
            scaled = points[own] / norms * norms.mean()
            assert_near(centroid, (weights[own, None] * scaled).sum(0) / weights[own].sum())


@PROPERTY
@given(SHAPES)
def test_empty_clusters_keep_their_centroid(shape):
    """A centroid opposite to every point stays bit for bit."""
    points, weights, start = drawn(shape)
    points, start = points.abs(), start.abs()
    away = -torch.ones(1, points.shape[1], dtype=torch.float64)
    centroids, labels = spherical_kmeans(points, weights, torch.cat([away, start]))
    assert torch.equal(centroids[:1], away) and 0 not in labels


@PROPERTY
@given(SHAPES, st.sampled_from([0.25, 4.0, 1024.0]))
def test_scale_passes_through(shape, scale):
    """Points twice as long give centroids twice as long; the scale of the weights does not matter."""
    points, weights, start = drawn(shape)
    centroids, labels = spherical_kmeans(points, weights, start)
    scaled, same = spherical_kmeans(points * scale, weights * 3.0, start * scale)
    assert torch.equal(same, labels)
    assert_near(scaled / scale, centroids)


@PROPERTY
@given(SHAPES)
def test_centroids_are_no_longer_than_their_members(shape):
    """A mean of vectors of equal norm has at most that norm; a single member is returned as it is."""
    points, weights, start = drawn(shape)
    centroids, labels = spherical_kmeans(points, weights, start)
    for cluster in labels.unique():
        members = points[labels == cluster]
        assert centroids[cluster].norm() <= members.norm(dim=1).mean() + 1e-12
        if len(members) == 1:
            assert_near(centroids[cluster], members[0], 1e-12)


def test_ties_go_to_the_lower_cluster():
    """A point between two axes belongs to the first of them."""
    points = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 2.0]])
    assert nearest_direction(torch.nn.functional.normalize(points, dim=1), torch.eye(3)).tolist() == [0, 1, 2]
    _, labels = spherical_kmeans(points, torch.ones(3), torch.eye(3), iterations=1)
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equalised_means_by_hand(dtype):
    """Two axes of lengths 1 and 3 average at length 2 each, one to three; the second cluster is empty."""
    directions, previous = torch.eye(2, dtype=dtype), torch.tensor([[9.0, 9.0], [7.0, 7.0]], dtype=dtype)
    norms, labels = torch.tensor([1.0, 3.0], dtype=dtype), torch.tensor([0, 0])
    actual = equalised_means(directions, norms, torch.tensor([1.0, 3.0], dtype=dtype), labels, previous)
    assert actual.tolist() == [[0.5, 1.5], [7.0, 7.0]]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weightless_clusters_are_averaged_evenly(dtype):
    """Where no member weighs anything all count the same; a member of weight zero beside others does not count."""
    points, weights, start = sample(dtype=dtype)
    _, labels = spherical_kmeans(points, weights, start, iterations=1)
    light = torch.where(labels == 0, 0.0, weights)
    even = torch.where(labels == 0, 1.0, weights)
    actual, expected = (spherical_kmeans(points, w, start, iterations=1)[0] for w in (light, even))
    assert (labels == 0).sum() > 1 and torch.equal(actual, expected)
    members = (labels == 1).nonzero().flatten()
    one = torch.zeros_like(weights)
    one[members[0]] = 0.5
    centroid = spherical_kmeans(points, one, start, iterations=1)[0][1]
    direction = points[members[0]] / points[members[0]].norm()
    assert len(members) > 1
    assert_near(centroid, (direction * points[members].norm(dim=1).mean()).double(), TOLERANCE[dtype])


@pytest.mark.parametrize("max_elements", [1, 9, 1000])
def test_blocks_change_nothing(max_elements):
    """The bound on memory changes neither centroids nor labels."""
    points, weights, start = sample()
    centroids, labels = spherical_kmeans(points, weights, start)
    blocked, same = spherical_kmeans(points, weights, start, max_elements=max_elements)
    assert torch.equal(same, labels)
    assert_near(blocked, centroids, 1e-12)


def test_tolerance_stops_after_taking_the_update():
    """The first update whose relative shift is within the tolerance is taken, and is the last."""
    points, weights, start = sample(points=40)
    steps = [start] + [spherical_kmeans(points, weights, start, n, tolerance=0.0)[0] for n in (1, 2, 3)]
    shifts = [float((b - a).norm() / a.norm()) for a, b in zip(steps, steps[1:], strict=False)]
    assert shifts[0] > 1.1 * shifts[1] > 1.2 * shifts[2] > 0
    for n, shift in enumerate(shifts, start=1):
        assert torch.equal(spherical_kmeans(points, weights, start, tolerance=shift * 1.001)[0], steps[n])
        assert not torch.equal(spherical_kmeans(points, weights, start, tolerance=shift * 0.999)[0], steps[n])


def test_initial_centroids():
    """`own` takes the first members, `gate` those of largest response with ties by index."""
    pool = torch.arange(10.0).view(5, 2)
    response = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0])
    assert torch.equal(initial_centroids(pool, response, 3, "own"), pool[:3])
    assert torch.equal(initial_centroids(pool, response, 3, "gate"), pool[[1, 3, 2]])
    assert torch.equal(initial_centroids(pool, response, 4, "gate"), pool[[1, 3, 2, 4]])


def test_many_equal_responses_go_by_index():
    """Ties are broken by index in pools as large as real ones, where an unstable sort would not."""
    response = torch.arange(256.0) % 3
    actual = initial_centroids(torch.arange(256.0).unsqueeze(1), response, 100, "gate")
    assert actual.flatten().tolist() == [*range(2, 256, 3), *range(1, 45, 3)]


def test_random_initial_centroids():
    """`random` takes distinct members, repeats for one seed, and leaves torch's own generator alone."""
    pool, state = torch.arange(40.0).view(20, 2), torch.get_rng_state()
    first, again, other = (initial_centroids(pool, pool[:, 0], 8, "random", seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()} & {tuple(row) for row in pool.tolist()}) == 8
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_start():
    """An unknown way to start is refused."""
    with pytest.raises(ValueError, match="unknown cluster_init 'best'"):
        initial_centroids(torch.ones(2, 2), torch.ones(2), 1, "best")
