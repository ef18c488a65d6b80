"""Spectral embedding: against scikit-learn's clustering, and apart by router group."""

import pytest
import torch
from samples import assert_near

from optimum_dern.core.criteria.selection import Places
from optimum_dern.core.merging.grouping import cluster_by_cosine
from optimum_dern.core.merging.spectral import spectral_embedding


def similarities(groups=(3, 2, 4), seed=0, noise=0.1):
    """A similarity of experts in groups, shuffled; and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    label = label[torch.randperm(len(label), generator=generator)]
    alike = (label.unsqueeze(1) == label).double()
    random = torch.rand(len(label), len(label), generator=generator, dtype=torch.float64)
    return 0.8 * alike + noise * (random + random.T) / 2, label


def same_partition(first, second):
    return torch.equal(first.unsqueeze(1) == first, second.unsqueeze(1) == second)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_found_as_by_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.cluster")
    similarity, label = similarities(seed=seed)
    vectors = spectral_embedding(similarity, 3)
    grouping = cluster_by_cosine(vectors, torch.ones(9), Places(3, 1))
    theirs = sklearn.SpectralClustering(3, affinity="precomputed", random_state=0).fit_predict(similarity.numpy())
    assert same_partition(grouping.label, label)
    assert same_partition(grouping.label, torch.from_numpy(theirs).long())


def test_eigenvectors():
    """Of D^-1/2 S D^-1/2, those of the largest eigenvalues, with a fixed sign."""
    similarity, _ = similarities()
    vectors = spectral_embedding(similarity, 3)
    matrix = similarity / similarity.sum(1).sqrt().unsqueeze(1) / similarity.sum(1).sqrt()
    values = torch.linalg.eigvalsh(matrix)[-3:]
    assert_near(matrix @ vectors, vectors * values)
    assert_near(vectors.T @ vectors, torch.eye(3, dtype=torch.float64))
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_router_groups_are_apart():
    similarity, _ = similarities((2, 2, 2))
    vectors = spectral_embedding(similarity, 4, 2)
    assert vectors.shape == (6, 2)
    for start in (0, 3):
        part = slice(start, start + 3)
        assert_near(vectors[part], spectral_embedding(similarity[part, part], 2))


def test_no_similarity_at_all():
    assert torch.isfinite(spectral_embedding(torch.zeros(4, 4), 2)).all()
