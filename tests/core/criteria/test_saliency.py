"""Scores of single experts: the published criteria and the random control."""

from dataclasses import replace

import pytest
import torch
from observed import observe
from reference import (
    reference_aimer,
    reference_easy_ep,
    reference_expert_output,
    reference_saliency,
    reference_statistics,
)
from samples import (
    KINDS,
    activation,
    assert_near,
    in_chunks,
    make_routing,
    make_segments,
    reference_arguments,
    scalar_activation,
)

from optimum_dern.core.criteria import saliency
from optimum_dern.core.layer.statistics import ExpertStatistics, measure_experts


NAMES = ["ean", "frequency", "man", "msan", "reap", "router"]  # of those that need nothing but statistics


def score(criterion, statistics):
    """Scores of one of `NAMES`."""
    return getattr(saliency, criterion)(statistics)


def statistics_of(kind="gated"):
    """Statistics of a layer whose expert 2 no token reaches."""
    return measure_experts(make_segments(kind), make_routing(unused=[2]), activation)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", NAMES)
def test_scores_match_the_reference(kind, criterion):
    """Each criterion equals its formula on the reference's own sums; an expert without tokens scores zero."""
    segments, routing = make_segments(kind), make_routing(unused=[2])
    positional, named = reference_arguments(segments, routing)
    scores = score(criterion, measure_experts(segments, routing, activation)[0])
    assert scores.dtype == torch.float64 and scores[2] == 0 and (scores > 0).sum() == 5
    assert_near(scores, reference_saliency(criterion, reference_statistics(*positional, **named)))


def test_scores_by_hand():
    """Five tokens, two of them routed to the first of three experts."""
    sums = ([2, 1, 0], [0.5, 1, 0], [6, 7, 0], [20, 49, 0], [1.5, 7, 0])
    statistics = replace(
        ExpertStatistics.zeros(3, 2),
        tokens=5,
        **dict(
            zip(
                ("count", "weight", "output_norm", "output_norm_squared", "weighted_output_norm"),
                (torch.tensor(values).double() for values in sums),
                strict=True,
            )
        ),
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
        assert_near(score(criterion, statistics), scores, 1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_mone_against_loops(kind):
    """The norm of the standard deviations of an expert's outputs, component by component, times its mean weight."""
    segments, routing = make_segments(kind), make_routing(unused=[2])
    found = saliency.mone(measure_experts(segments, routing, activation)[0])
    for expert in range(6):
        own = [(t, s) for t in range(12) for s in range(2) if routing.index[t, s] == expert]
        outputs = torch.stack(
            [
                torch.tensor(
                    reference_expert_output(
                        *segments[:3],
                        expert,
                        routing.hidden[t],
                        scalar_activation(segments),
                        segments.output_bias,
                        segments.biased,
                    ),
                    dtype=torch.float64,
                )
                for t, _ in own
            ]
            or [torch.zeros(3, dtype=torch.float64)]
        )
        deviation = outputs.var(0, correction=0).sqrt().norm()
        weight = sum(routing.weight[t, s].item() for t, s in own) / 12
        assert_near(found[expert], deviation * weight, 1e-8)
    assert found[2] == 0


@pytest.mark.parametrize("criterion", NAMES)
def test_no_tokens_score_zero(criterion):
    """Without any token every score is zero, not undefined."""
    assert score(criterion, ExpertStatistics.zeros(4, 3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("criterion", NAMES)
def test_scores_are_new_tensors(criterion):
    """Writing to the scores leaves the statistics alone."""
    statistics = statistics_of()
    saved = {name: torch.as_tensor(value).clone() for name, value in vars(statistics).items()}
    score(criterion, statistics).fill_(-1.0)
    for name, value in saved.items():
        assert torch.equal(torch.as_tensor(getattr(statistics, name)), value)


@pytest.mark.parametrize("criterion", ["reap", "man", "msan"])
def test_means_do_not_depend_on_the_amount_of_data(criterion):
    """Seeing the same tokens twice doubles sums but not means over routed tokens."""
    statistics = statistics_of()
    assert_near(score(criterion, statistics.merge(statistics)), score(criterion, statistics), 1e-12)
    assert_near(score("ean", statistics.merge(statistics)), 2 * score("ean", statistics), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_aimer_matches_the_reference(kind, dtype):
    """Ratios over gate, up and down weights in full precision, without the biases that stand beside them."""
    segments = make_segments(kind, dtype=dtype)
    scores = saliency.aimer(segments)
    assert scores.dtype == torch.float64 and (scores > 0).all() and (scores < 1).all()
    assert_near(scores, reference_aimer(*segments[:3], biased=segments.biased))


def test_aimer_keeps_the_expert_of_few_large_weights():
    """Of two experts of equal energy, the one whose weights all have the same size scores 0 and goes first."""
    segments = make_segments("plain", experts=2, width=2, hidden=2, output=2)
    even, peaked = torch.ones(2, 2), torch.tensor([[2.0, 0], [0, 0]])
    segments = segments._replace(up=torch.stack([even, peaked]), down=torch.stack([-even, peaked]))
    assert_near(saliency.aimer(segments), [0, 0.5])


@pytest.mark.parametrize("kind", KINDS)
def test_easy_ep_matches_the_reference(kind):
    """Contributions count by how far the routed output turns the residual stream, chunk by chunk."""
    segments, routing = in_chunks(make_segments(kind), 5), make_routing(unused=[2])
    residual = 2 * torch.randn(12, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    positional, named = reference_arguments(segments, routing)
    scores = saliency.easy_ep(observe(segments, routing, residual=residual))
    assert scores.dtype == torch.float64 and scores[2] == 0
    assert_near(scores, reference_easy_ep(*positional, residual, **named))


def test_easy_ep_sums_over_processes():
    """What one process sums up goes through `reduce`."""
    segments, routing = make_segments(), make_routing()
    layer = observe(segments, routing, residual=torch.ones(12, 3).double())
    doubled = replace(layer, reduce=lambda local, operation="sum": {"sum": 2 * local}[operation])
    assert_near(saliency.easy_ep(doubled), 2 * saliency.easy_ep(layer))


def test_easy_ep_counts_no_token_that_stays_its_direction():
    """Where the output points along the residual stream, nothing has been contributed."""
    segments, routing = make_segments(), make_routing()
    layer = observe(segments, routing)
    assert_near(saliency.easy_ep(replace(layer, residual=3 * layer.target)), torch.zeros(6), 1e-12)
    assert (saliency.easy_ep(replace(layer, residual=-3 * layer.target.roll(1, dims=1))) > 1e-3).all()


def test_random_scores_are_seeded():
    """The control repeats for one seed, differs between seeds, and leaves torch's own generator alone."""
    state = torch.get_rng_state()
    scores = saliency.random(6, seed=3)
    assert scores.shape == (6,) and scores.dtype == torch.float64 and len(set(scores.tolist())) == 6
    assert torch.equal(scores, saliency.random(6, seed=3))
    assert not torch.equal(scores, saliency.random(6, seed=4))
    assert torch.equal(torch.get_rng_state(), state)
