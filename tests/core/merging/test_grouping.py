"""Grouping experts: slow references, router groups, protected experts, ties and degenerate layers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import PROPERTY
from scipy.cluster.hierarchy import cut_tree, linkage

from optimum_dern.core.criteria.selection import Places, select_experts
from optimum_dern.core.merging.expert_clustering import average_linkage, kmeans_by_cosine
from optimum_dern.core.merging.grouping import (
    Grouping,
    absorb_nearest,
    cluster_by_cosine,
    join_nearest,
    link_by_average,
)


def random_case(seed, experts=8, size=3):
    """Vectors, a symmetric similarity and scores of a layer."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(experts, size, generator=generator, dtype=torch.float64)
    similarity = torch.rand(experts, experts, generator=generator, dtype=torch.float64)
    return vectors, (similarity + similarity.T) / 2, torch.rand(experts, generator=generator, dtype=torch.float64)


def partition(label):
    """The clusters as a set of sets."""
    return {frozenset(np.flatnonzero(np.asarray(label) == c).tolist()) for c in set(np.asarray(label).tolist())}


@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([2, 4, 6, 8]))
@PROPERTY
def test_every_grouping_keeps_its_promises(seed, num_groups, count):
    """N representatives in order, each in its own group, as many in every router group, groups inside them."""
    vectors, similarity, scores = random_case(seed)
    protected = (1,) if count == 2 else (1, 2)
    places = Places(count, num_groups, protected)
    retained = select_experts(scores, *places)
    groupings = {
        "join": join_nearest(retained, similarity, num_groups),
        "absorb": absorb_nearest(retained, similarity, scores, -(-8 // count), num_groups),
        "link": link_by_average(vectors, scores, places),
        "cluster": cluster_by_cosine(vectors, scores, places, seed),
    }
    for grouping in groupings.values():
        kept = grouping.retained.tolist()
        assert kept == sorted(set(kept)) and len(kept) == count
        assert set(protected) <= set(kept)
        assert grouping.label[grouping.retained].tolist() == list(range(count))
        size = 8 // num_groups
        assert [sum(k // size == g for k in kept) for g in range(num_groups)] == [count // num_groups] * num_groups
        assert all(kept[label] // size == expert // size for expert, label in enumerate(grouping.label.tolist()))
    for name in ("link", "cluster"):
        kept, label = groupings[name]
        for position, expert in enumerate(kept.tolist()):
            rivals = [e for e in range(8) if label[e] == position]
            assert expert in protected or scores[expert] == scores[rivals].max()


def test_members():
    """The representative comes first, whatever its number."""
    grouping = Grouping(torch.tensor([1, 4]), torch.tensor([1, 0, 0, 1, 1]))
    assert [grouping.members(0), grouping.members(1)] == [[1, 2], [4, 0, 3]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_groups", [1, 2])
def test_joining_against_loops(seed, num_groups):
    """Each expert's representative is the most similar one of its router group."""
    _, similarity, scores = random_case(seed)
    retained = select_experts(scores, 4, num_groups)
    grouping = join_nearest(retained, similarity, num_groups)
    for expert in range(8):
        allowed = [r for r in retained.tolist() if r // (8 // num_groups) == expert // (8 // num_groups)]
        expected = expert if expert in allowed else max(allowed, key=lambda r: similarity[expert, r])
        assert grouping.retained[grouping.label[expert]] == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("capacity", "num_groups"), [(2, 1), (3, 1), (8, 1), (2, 2), (4, 2)])
def test_absorbing_against_loops(seed, capacity, num_groups):
    """The best representative fills its group first, from the nearest free experts of its router group."""
    _, similarity, scores = random_case(seed)
    retained = select_experts(scores, 4, num_groups).tolist()
    owner = {r: r for r in retained}
    for r in sorted(retained, key=lambda r: -scores[r]):
        for expert in sorted(range(8), key=lambda e: -similarity[r, e]):
            same = expert // (8 // num_groups) == r // (8 // num_groups)
            if expert not in owner and same and list(owner.values()).count(r) < capacity:
                owner[expert] = r
    grouping = absorb_nearest(torch.tensor(retained), similarity, scores, capacity, num_groups)
    assert [retained[label] for label in grouping.label.tolist()] == [owner[expert] for expert in range(8)]


def test_groups_too_small_for_all():
    """An error, never an expert without a group."""
    _, similarity, scores = random_case(0)
    with pytest.raises(ValueError, match="groups of 2 cannot hold 8 experts around 3"):
        absorb_nearest(torch.arange(3), similarity, scores, 2)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_linkage_against_scipy(seed, count):
    """The clusters of scipy's average linkage."""
    vectors, _, _ = random_case(seed)
    tree = linkage(vectors.numpy(), method="average")
    expected = partition(cut_tree(tree, n_clusters=count).ravel())
    assert partition(average_linkage(torch.cdist(vectors, vectors), count, [])) == expected
    assert partition(link_by_average(vectors, torch.arange(8.0), Places(count)).label) == expected


def test_points_kept_apart():
    """Two copies of one point stay apart where they must, and so do what has joined them."""
    vectors = torch.tensor([[0.0, 0], [0, 0], [0.1, 0], [5, 5], [6, 5]], dtype=torch.float64)
    distance = torch.cdist(vectors, vectors)
    assert partition(average_linkage(distance, 2, [])) == {frozenset({0, 1, 2}), frozenset({3, 4})}
    assert partition(average_linkage(distance, 3, [0, 1])) == {frozenset({0, 2}), frozenset({1}), frozenset({3, 4})}
    for label in (average_linkage(distance, 2, [0, 1]), kmeans_by_cosine(vectors, 2, [0, 1], torch.Generator())):
        assert label[0] != label[1] and set(label.tolist()) == {0, 1}


@pytest.mark.parametrize("seed", range(10))
def test_kmeans_ends_at_a_fixed_point(seed):
    """No cluster is empty, and each point is in the cluster whose mean direction is nearest to it."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(30, 3, generator=generator, dtype=torch.float64), dim=1)
    label = kmeans_by_cosine(directions, 5, [], generator)
    means = torch.stack([directions[label == c].mean(0) for c in range(5)])
    assert torch.equal((directions @ torch.nn.functional.normalize(means, dim=1).T).argmax(1), label)


def test_kmeans_finds_what_is_there():
    """Three bundles of directions are found from every start; lengths do not matter."""
    axes = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    noise = 0.01 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.arange(1, 13, dtype=torch.float64).unsqueeze(1)
    expected = {frozenset(range(start, 12, 3)) for start in range(3)}
    for seed in range(20):
        grouping = cluster_by_cosine((axes + noise) * lengths, torch.arange(12), Places(3), seed)
        assert partition(grouping.label) == expected
        assert grouping.retained.tolist() == [9, 10, 11]


@pytest.mark.parametrize("seed", range(3))
def test_identical_experts_fill_every_cluster(seed):
    """Where all vectors are the same, or zero, there are still N clusters."""
    for vectors in (torch.ones(6, 2), torch.zeros(6, 2)):
        for grouping in (
            cluster_by_cosine(vectors, torch.arange(6), Places(4), seed),
            link_by_average(vectors, torch.arange(6), Places(4)),
        ):
            assert set(grouping.label.tolist()) == {0, 1, 2, 3}


def test_the_seed_decides():
    """The same seed gives the same groups, and the global random state does not matter."""
    vectors, _, scores = random_case(3, experts=16)
    torch.manual_seed(0)
    first = cluster_by_cosine(vectors, scores, Places(6), 1)
    torch.manual_seed(1)
    assert torch.equal(first.label, cluster_by_cosine(vectors, scores, Places(6), 1).label)
    labels = {tuple(cluster_by_cosine(vectors, scores, Places(6), seed).label.tolist()) for seed in range(20)}
    assert len(labels) > 1
