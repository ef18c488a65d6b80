"""REAM, M-SMoE, HC-SMoE, MergeMoE, Sub-MoE and UNCURL on one layer: slow references, copies, several processes."""

from itertools import pairwise
from threading import Barrier, Thread

import merging_reference as slow
import pytest
import torch
from observed import observe
from samples import activation, assert_near, assert_unchanged, copies, make_routing, make_segments

from optimum_dern import DernConfig
from optimum_dern.core.criteria.registry import CRITERIA
from optimum_dern.core.criteria.selection import select_experts
from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.merging.grouping import cluster_by_cosine
from optimum_dern.methods import LayerProblem, get_method


KINDS = ["gated", "plain", "biased"]
MERGING = ["ream", "m_smoe", "hc_smoe", "mergemoe", "sub_moe", "uncurl"]
ALIGNING = ["ream", "m_smoe", "uncurl"]
EXPERTS, KEPT = 6, 3


def make_layer(segments, tokens=60, rows=None, unused=(), **fields):
    """Random tokens behind a random router matrix."""
    routing = make_routing(tokens=tokens, unused=unused)
    if rows is None:
        rows = torch.randn(EXPERTS, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return observe(segments, routing, rows, **fields)


def propose(method, layer, scores=None, retained=None, seed=0, **fields):
    """The candidates of one method, and the problem that it was given."""
    config = DernConfig(method=method, dataset=["unused"], seed=seed)
    scores = CRITERIA[config.selection].function(layer.statistics) if scores is None else scores
    retained = select_experts(scores, KEPT, layer.num_groups) if retained is None else retained
    problem = LayerProblem(layer, scores, retained, **fields)
    return get_method(method).compress_layer(problem, config), problem


def reference(method, layer, problem):
    """What the slow reference makes of the same problem: owner of each expert, merged experts by representative."""
    hidden = layer.routing.hidden[~layer.held_out]
    plain = slow.Layer(layer.segments, hidden, layer.router_rows)
    scores, retained = problem.scores.tolist(), problem.retained.tolist()
    frequency = layer.statistics.count.tolist()
    if method == "ream":
        return slow.ream(plain, retained, scores, capacity=2)
    if method == "m_smoe":
        return slow.m_smoe(plain, retained, frequency)
    if method == "hc_smoe":
        return slow.hc_smoe(plain, KEPT, frequency, scores)
    return slow.mergemoe(plain, retained, frequency, layer.segments, hidden, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ream", "m_smoe", "hc_smoe", "mergemoe"])
@pytest.mark.parametrize("unused", [(), (2,)])
def test_against_the_slow_reference(method, kind, unused):
    """Groups, merged weights and biases, router rows; an expert that no token reached takes part."""
    held_out = torch.arange(60) % 6 == 5
    layer = make_layer(make_segments(kind, width=4), unused=unused, held_out=held_out)
    before = copies(layer.segments, layer.routing)
    candidates, problem = propose(method, layer)
    owner, expected = reference(method, layer, problem)
    assert list(candidates) == ["pruned", "merged"]
    candidate = candidates["merged"]
    assert candidate.retained.tolist() == sorted(set(owner)) and len(set(owner)) == KEPT
    for position, expert in enumerate(candidate.retained.tolist()):
        matrix, bias = expected[expert]
        assert_near(candidate.segments.concatenated(position), matrix, 1e-7)
        if bias is not None:
            assert_near(candidate.segments.output_bias[position], bias)
    assert torch.equal(candidate.router_rows, layer.router_rows[candidate.retained])
    pruned = candidates["pruned"].segments
    assert torch.equal(pruned.up, layer.segments.up[problem.retained])
    assert_unchanged(before, layer.segments, layer.routing)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unused", [(), (2,)])
def test_sub_moe_is_the_union_decomposition(kind, unused):
    """Groups by the reference's mean outputs; weights by the paper's equations: a union SVD, its V averaged."""
    layer = make_layer(make_segments(kind, width=4), unused=unused)
    candidates, problem = propose("sub_moe", layer)
    means = torch.from_numpy(slow.Layer(layer.segments, layer.routing.hidden).means())
    grouping = cluster_by_cosine(means, problem.scores, problem.places, seed=0)
    merged, frequency = candidates["merged"], layer.statistics.count.tolist()
    assert torch.equal(merged.retained, grouping.retained)
    for position in range(KEPT):
        members = grouping.members(position)
        for part, result in zip(layer.segments[:3], merged.segments[:3], strict=True):
            if part is not None:
                matrices = [part[expert].numpy().T for expert in members]
                assert_near(result[position].T, slow.union_svd(matrices, [frequency[e] for e in members]))
    assert max(len(grouping.members(position)) for position in range(KEPT)) > 2


def test_the_seed_of_sub_moe():
    """It decides how k-means starts, the same every time."""
    layer = make_layer(make_segments())
    merged = [propose("sub_moe", layer, seed=seed)[0]["merged"].segments.up for seed in [*range(8), *range(8)]]
    assert all(torch.equal(merged[seed], merged[8 + seed]) for seed in range(8))
    assert not all(torch.equal(merged[0], other) for other in merged)


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_merge_to_the_function_that_they_are(method, kind):
    """Three pairs of copies become three experts, and the layer, asked for them by group, gives what it gave.

    Neurons of the copies are shuffled for the methods that align them.  The router is left out: with two copies
    chosen by one token, no router of three experts can choose alike.
    """
    segments = make_segments(kind)
    order = torch.tensor([3, 0, 4, 1, 2]) if method in ALIGNING else torch.arange(5)
    rows = torch.randn(EXPERTS, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for part in segments[:3]:
        if part is not None:
            part[1::2] = part[::2][:, order]
    for part in (rows, segments.output_bias):
        if part is not None:
            part[1::2] = part[::2]
    layer = make_layer(segments, rows=rows)
    scores = torch.tensor([1.0, 2, 3, 2, 1, 2])  # of each pair one expert is retained
    candidates, _ = propose(method, layer, scores, torch.tensor([1, 2, 5]))
    merged = candidates["merged"]
    assert merged.retained.tolist() == [1, 2, 5]
    routing = layer.routing._replace(index=layer.routing.index // 2)
    actual = routed_output(merged.segments, routing, activation)
    assert_near(actual, layer.target, 1e-4 if method == "mergemoe" else 1e-10)


@pytest.mark.parametrize("method", MERGING)
def test_router_groups(method):
    """Experts merge inside their router group only, and every group keeps the same number."""
    for seed in range(5):
        layer = make_layer(make_segments(seed=seed), num_groups=2)
        scores = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        retained = select_experts(scores, 4, 2)
        candidates, _ = propose(method, layer, scores, retained)
        kept = candidates["merged"].retained.tolist()
        assert [expert // 3 for expert in kept] == [0, 0, 1, 1]
        assert len(candidates["merged"].segments.up) == 4


@pytest.mark.parametrize("method", MERGING)
def test_protected_experts_represent_their_group(method):
    """Also those of the lowest score, and also of methods that choose representatives by themselves."""
    layer = make_layer(make_segments())
    scores = torch.arange(EXPERTS, dtype=torch.float64) + 1
    retained = select_experts(scores, KEPT, 1, [0, 1])
    candidates, _ = propose(method, layer, scores, retained, protected=(0, 1))
    assert {0, 1} <= set(candidates["merged"].retained.tolist())


@pytest.mark.parametrize("method", MERGING)
def test_nothing_to_merge(method):
    """Where all experts stay, the layer stays as it is."""
    layer = make_layer(make_segments())
    candidates, _ = propose(method, layer, retained=torch.arange(EXPERTS))
    assert list(candidates) == ["pruned"] and torch.equal(candidates["pruned"].segments.up, layer.segments.up)


@pytest.mark.parametrize("method", MERGING)
def test_routers_without_a_matrix(method):
    """Methods that look at logits say why they cannot; the others need no router."""
    layer = observe(make_segments(), make_routing(tokens=20))
    if method in ALIGNING:
        with pytest.raises(ValueError, match="no single matrix.*hc_smoe"):
            propose(method, layer)
    else:
        assert propose(method, layer)[0]["merged"].router_rows is None


class Pair:
    """Two processes in two threads, who wait for each other at every sum."""

    def __init__(self):
        self.barrier, self.parts = Barrier(2, timeout=20), [None, None]

    def reduce(self, rank):
        """A `Reduce` of one of them."""

        def reduce(local, operation="sum"):
            self.parts[rank] = local.clone()
            self.barrier.wait()
            total = self.parts[0] + self.parts[1] if operation == "sum" else torch.maximum(*self.parts)
            self.barrier.wait()
            return total

        return reduce


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("cut", [20, 60])
def test_two_processes_agree_with_one(method, cut):
    """Both arrive at the same experts to the bit, and at those of a single process; one may have no tokens."""
    whole = make_layer(make_segments(width=4))
    expected, problem = propose(method, whole)
    pair, results = Pair(), [None, None]

    def run(rank, part):
        layer = observe(whole.segments, whole.routing.select(part), whole.router_rows, reduce=pair.reduce(rank))
        object.__setattr__(layer, "statistics", whole.statistics)
        results[rank] = propose(method, layer, problem.scores, problem.retained)[0]["merged"]

    threads = [Thread(target=run, args=(r, p)) for r, p in enumerate([slice(cut), slice(cut, None)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in pairwise([*results, expected["merged"]]):
        assert torch.equal(a.retained, b.retained)
    for a, b, c in zip(results[0].segments[:3], results[1].segments[:3], expected["merged"].segments[:3], strict=True):
        assert torch.equal(a, b)
        assert_near(a, c, 1e-8)
