"""Scores from statistics: the published criteria and the random control."""

from dataclasses import replace

import pytest
import torch
from reference import reference_saliency, reference_statistics
from samples import KINDS, activation, assert_near, make_routing, make_segments, reference_arguments

from optimum_dern.core.saliency import CRITERIA, score_experts
from optimum_dern.core.statistics import ExpertStatistics, measure_experts


NAMES = ["ean", "frequency", "man", "msan", "reap", "router"]


def statistics_of(kind="gated"):
    """Statistics of a layer whose expert 2 no token reaches."""
    return measure_experts(make_segments(kind), make_routing(unused=[2]), activation)[0]


def test_every_published_criterion_is_there():
    """The table lists exactly the criteria that the reference knows."""
    assert sorted(CRITERIA) == NAMES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", NAMES)
def test_scores_match_the_reference(kind, criterion):
    """Each criterion equals its formula on the reference's own sums; an expert without tokens scores zero."""
    segments, routing = make_segments(kind), make_routing(unused=[2])
    positional, named = reference_arguments(segments, routing)
    scores = score_experts(criterion, measure_experts(segments, routing, activation)[0])
    assert scores.dtype == torch.float64 and scores[2] == 0 and (scores > 0).sum() == 5
    assert_near(scores, reference_saliency(criterion, reference_statistics(*positional, **named)))


def test_scores_by_hand():
    """Five tokens, two of them routed to the first of three experts."""
    statistics = ExpertStatistics(
        5,
        *(torch.tensor(v).double() for v in ([2, 1, 0], [0.5, 1, 0], [6, 7, 0], [20, 49, 0], [1.5, 7, 0])),
        torch.zeros(3, 2).double(),
        torch.zeros(3, 3).double(),
    )
    expected = {
        "frequency": [0.4, 0.2, 0],
        "router": [0.1, 0.2, 0],
        "ean": [6, 7, 0],
        "reap": [0.75, 7, 0],
        "man": [3, 7, 0],
        "msan": [10, 49, 0],
    }
    for criterion, scores in expected.items():
        assert_near(score_experts(criterion, statistics), scores, 1e-15)


@pytest.mark.parametrize("criterion", NAMES)
def test_no_tokens_score_zero(criterion):
    """Without any token every score is zero, not undefined."""
    assert score_experts(criterion, ExpertStatistics.zeros(4, 3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("criterion", NAMES)
def test_scores_are_new_tensors(criterion):
    """Writing to the scores leaves the statistics alone."""
    statistics = statistics_of()
    saved = replace(
        statistics, **{name: value.clone() for name, value in vars(statistics).items() if name != "tokens"}
    )
    score_experts(criterion, statistics).fill_(-1.0)
    for name, value in vars(saved).items():
        assert torch.equal(torch.as_tensor(getattr(statistics, name)), torch.as_tensor(value))


@pytest.mark.parametrize("criterion", ["reap", "man", "msan"])
def test_means_do_not_depend_on_the_amount_of_data(criterion):
    """Seeing the same tokens twice doubles sums but not means over routed tokens."""
    statistics = statistics_of()
    assert_near(score_experts(criterion, statistics.merge(statistics)), score_experts(criterion, statistics), 1e-12)
    assert_near(score_experts("ean", statistics.merge(statistics)), 2 * score_experts("ean", statistics), 1e-12)


def test_random_scores_are_seeded():
    """The control repeats for one seed, differs between seeds, and leaves torch's own generator alone."""
    statistics, state = statistics_of(), torch.get_rng_state()
    scores = score_experts("random", statistics, seed=3)
    assert scores.shape == (6,) and scores.dtype == torch.float64 and len(set(scores.tolist())) == 6
    assert torch.equal(scores, score_experts("random", statistics, seed=3))
    assert not torch.equal(scores, score_experts("random", statistics, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_criterion():
    """An unknown name is refused, and the message lists what exists."""
    with pytest.raises(ValueError, match="unknown selection criterion 'norm'.*'random'.*'router'"):
        score_experts("norm", statistics_of())
