"""HOPE: the least p^T F p, against brute force."""

from dataclasses import replace

import pytest
import torch
from reference import reference_allowed_sets, reference_hope_cost, reference_statistics
from samples import KINDS, activation, assert_near, make_routing, make_segments, reference_arguments

from optimum_dern.core.criteria import hope as module
from optimum_dern.core.criteria.hope import hope, interaction
from optimum_dern.core.criteria.selection import Places, select_experts
from optimum_dern.core.layer.statistics import ExpertStatistics, measure_experts


def made_of(matrix):
    """Statistics whose interaction is a given symmetric matrix."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    zeros = ExpertStatistics.zeros(len(matrix), 1)
    return replace(zeros, coactivation=3 * matrix, together=torch.full_like(matrix, 3.0))


def cost_of(statistics, kept):
    """p^T F p by the reference."""
    sums = {"count": statistics.count, "coactivation": statistics.coactivation, "together": statistics.together}
    return reference_hope_cost(sums, kept)


def random_interaction(experts, seed):
    """Positive and symmetric, with off-diagonals that matter."""
    values = torch.rand(experts, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values + values.T + torch.eye(experts, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_interaction_matches_the_reference(kind):
    """F is the mean product of contributions over the tokens that chose both, and the scores are its diagonal."""
    segments, routing = make_segments(kind), make_routing(top_k=3, unused=[2])
    positional, named = reference_arguments(segments, routing)
    sums = reference_statistics(*positional, **named)
    statistics = measure_experts(segments, routing, activation)[0]
    expected = torch.where(sums["together"] > 0, sums["coactivation"] / sums["together"], 0.0)
    assert_near(interaction(statistics), expected)
    scores, _ = hope(statistics, Places(3))
    assert_near(scores, expected.diagonal())
    assert scores[2] == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("places", [Places(4), Places(4, 2), Places(4, 2, (0, 5)), Places(3, 1, (1,)), Places(7)])
def test_the_set_is_the_best(seed, places):
    """Eight experts: no allowed set costs less, groups and protected experts respected."""
    statistics = made_of(random_interaction(8, seed))
    _, retained = hope(statistics, places)
    assert retained.tolist() == min(reference_allowed_sets(8, *places), key=lambda kept: cost_of(statistics, kept))


def test_the_set_from_tokens_is_the_best():
    """The same from the sums of routed tokens, where most pairs of experts never meet."""
    segments, routing = make_segments(experts=9), make_routing(experts=9, tokens=25)
    positional, named = reference_arguments(segments, routing)
    sums = reference_statistics(*positional, **named)
    _, retained = hope(measure_experts(segments, routing, activation)[0], Places(4))
    costs = [reference_hope_cost(sums, kept) for kept in reference_allowed_sets(9, 4)]
    assert reference_hope_cost(sums, retained.tolist()) == pytest.approx(min(costs), rel=1e-9)


def test_coactivation_decides():
    """Experts 0 and 1 cost little each but much together: one of them stays, as no ranking of scores would have it."""
    statistics = made_of([[1, 5, 0, 0], [5, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 3]])
    scores, retained = hope(statistics, Places(2))
    assert scores.tolist() == [1, 1, 2, 3]
    assert select_experts(scores, 2).tolist() == [2, 3]
    assert len({0, 1} & set(retained.tolist())) == 1 and 3 in retained


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("places", [Places(6), Places(6, 2), Places(8, 4, (0, 1)), Places(5, 1, (3, 4))])
def test_where_sets_are_many(monkeypatch, seed, places):
    """Without trying all: no exchange of two experts costs less, nor do the experts of the largest scores."""
    monkeypatch.setattr(module, "MAX_SETS", 0)
    statistics = made_of(random_interaction(12, seed))
    scores, retained = hope(statistics, places)
    own = retained.tolist()
    allowed = list(reference_allowed_sets(12, *places))
    neighbours = [kept for kept in allowed if len(set(kept) & set(own)) == places.count - 1]
    others = [*neighbours, select_experts(scores, *places).tolist()]
    assert own in allowed and neighbours
    assert all(cost_of(statistics, own) <= cost_of(statistics, kept) + 1e-9 for kept in others)


def test_the_relaxed_problem_is_solved(monkeypatch):
    """Interactions that make it convex: rounding its solution is the best set, without a single exchange."""
    monkeypatch.setattr(module, "MAX_SETS", 0)
    monkeypatch.setattr(module, "_exchanged", lambda matrix, kept, places: kept)
    matrix = torch.full((10, 10), 0.1) + torch.diag(torch.arange(1.0, 11))
    matrix[:5, :5] += 3  # the five of least score meet often
    statistics = made_of(matrix)
    _, retained = hope(statistics, Places(5))
    best = min(reference_allowed_sets(10, 5), key=lambda kept: cost_of(statistics, kept))
    assert retained.tolist() == best != [5, 6, 7, 8, 9]


def test_the_smallest_scores_are_a_start_too(monkeypatch):
    """Where the relaxed solution misleads, the experts of least F_kk are pruned."""
    monkeypatch.setattr(module, "MAX_SETS", 0)
    monkeypatch.setattr(module, "_exchanged", lambda matrix, kept, places: kept)
    monkeypatch.setattr(module, "_relaxed", lambda matrix, places: matrix.diagonal())  # prunes the costliest
    matrix = torch.diag(torch.tensor([3.0, 1, 4, 2, 6, 5]))
    assert hope(made_of(matrix), Places(3))[1].tolist() == [2, 4, 5]
    assert hope(made_of(matrix), Places(2, 2))[1].tolist() == [2, 4]


@pytest.mark.parametrize("places", [Places(6, 2), Places(6, 2, (0, 7, 8)), Places(9, 3, (1, 2, 3))])
def test_the_relaxed_solution_keeps_the_limits(places):
    """Between 0 and 1, as many pruned as ask for it in every group, and no part of a protected expert."""
    size = 12 // places.num_groups
    solution = module._relaxed(random_interaction(12, 1).numpy(), places)
    assert solution.min() >= -1e-9 and solution.max() <= 1 + 1e-9
    assert abs(solution[list(places.protected)]).max(initial=0) < 1e-9
    sums = solution.reshape(places.num_groups, -1).sum(1)
    assert sums == pytest.approx([size - places.count // places.num_groups] * places.num_groups)


@pytest.mark.parametrize("places", [Places(4), Places(2, 2), Places(2, 1, (3,))])
def test_no_tokens_and_no_choice(places):
    """All costs zero, or all experts retained or protected: a valid set comes out."""
    _, retained = hope(ExpertStatistics.zeros(4, 3), places)
    assert len(retained) == places.count and set(places.protected) <= set(retained.tolist())
    assert retained.tolist() == sorted(retained.tolist())


def test_infinite_outputs_are_refused():
    """Statistics that are not finite do not reach the solver."""
    with pytest.raises(ValueError, match="NaN or infinity"):
        hope(made_of([[1, float("nan")], [1, 1]]), Places(1))
