"""Merging groups of experts: averages and output fits against slow references, and what is exact."""

import numpy as np
import pytest
import torch
from observed import observe
from samples import KINDS, TOLERANCE, activation, assert_near, assert_unchanged, copies, make_routing, make_segments

from optimum_dern.core.layer.mixture import neuron_activations
from optimum_dern.core.merging.all_experts import sample_tokens
from optimum_dern.core.merging.averaging import average_groups, fit_group_outputs, shares
from optimum_dern.core.merging.grouping import Grouping


GROUPING = Grouping(torch.tensor([1, 3, 4]), torch.tensor([0, 0, 1, 1, 2, 0]))  # {1, 0, 5}, {3, 2}, {4}
WEIGHTS = torch.tensor([2.0, 1.0, 0.0, 0.0, 3.0, 5.0])
SHARES = [{1: 1 / 8, 0: 2 / 8, 5: 5 / 8}, {3: 0.5, 2: 0.5}, {4: 1.0}]


def test_shares():
    """They sum to 1, and a group that weighs nothing is shared evenly."""
    assert [shares(WEIGHTS, list(group)) for group in SHARES] == [list(group.values()) for group in SHARES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_averages_against_loops(kind, dtype):
    """Neurons in the order that the alignment says, output biases with them; a group of one keeps its bits."""
    segments = make_segments(kind, dtype=dtype)
    before, order = copies(segments), torch.tensor([4, 2, 0, 1, 3])
    asked = []

    def align(representative, member):
        asked.append((representative, member))
        return order

    merged = average_groups(segments, GROUPING, WEIGHTS, align)
    assert asked == [(1, 0), (1, 5), (3, 2)]
    for part, result in zip(segments[:3], merged[:3], strict=True):
        assert (part is None) == (result is None)
        for position, group in enumerate(SHARES) if part is not None else ():
            for neuron in range(5):
                expected = sum(
                    share * part[expert][neuron if expert == list(group)[0] else order[neuron]].double()
                    for expert, share in group.items()
                )
                assert_near(result[position, neuron], expected, TOLERANCE[dtype])
        assert result is None or torch.equal(result[2], part[4])
    if segments.output_bias is not None:
        expected = [sum(share * segments.output_bias[e].double() for e, share in group.items()) for group in SHARES]
        assert_near(merged.output_bias, torch.stack(expected), TOLERANCE[dtype])
    assert merged.biased is segments.biased and merged.up.dtype == dtype
    assert_unchanged(before, segments)


def test_processes_may_share_the_groups():
    """Averages that come from elsewhere, and in a list, are taken as they are."""
    segments = make_segments("biased")
    expected = average_groups(segments, GROUPING, WEIGHTS)
    actual = average_groups(segments, GROUPING, WEIGHTS, map_experts=lambda f, items: [f(item) for item in items])
    for a, b in zip(actual[:4], expected[:4], strict=True):
        assert torch.equal(a, b)


def group_errors(layer, hidden, merged):
    """Mean squared distance of every merged expert's output to the mean of its members' outputs."""

    def output(segments, expert):
        result = neuron_activations(segments, expert, hidden, activation) @ segments.down[expert]
        return result if segments.output_bias is None else result + segments.output_bias[expert]

    return [
        (output(merged, p) - sum(share * output(layer.segments, e) for e, share in group.items())).square().sum()
        for p, group in enumerate(SHARES)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_output_fit_against_the_pseudo_inverse(kind):
    """D' = Q P^+ where the tokens determine it; no other down projection comes closer."""
    segments = make_segments(kind)
    held_out = torch.arange(80) % 2 == 1
    layer = observe(segments, make_routing(tokens=80), held_out=held_out)
    hidden, averaged = sample_tokens(layer), average_groups(segments, GROUPING, WEIGHTS)
    fitted = fit_group_outputs(layer, hidden, GROUPING, WEIGHTS, averaged)
    for position, group in enumerate(SHARES[:2]):
        p = neuron_activations(averaged, position, hidden, activation).numpy()
        bias = 0 if averaged.output_bias is None else averaged.output_bias[position]
        q = -bias + sum(
            share * (neuron_activations(segments, e, hidden, activation) @ segments.down[e])
            + (0 if segments.output_bias is None else share * segments.output_bias[e])
            for e, share in group.items()
        )
        penalty = np.sqrt(1e-6 * (p**2).sum() / 5)  # of departures from the average, far below what the tokens say
        rows, right = np.vstack([p, penalty * np.eye(5)]), np.vstack([q, penalty * averaged.down[position]])
        assert_near(fitted.down[position], np.linalg.lstsq(rows, right)[0], 1e-8)
        assert_near(fitted.down[position], np.linalg.pinv(p) @ q.numpy(), 1e-2)
    assert torch.equal(fitted.down[2], segments.down[4])
    before, after = group_errors(layer, hidden, averaged), group_errors(layer, hidden, fitted)
    assert all(b < 0.9 * a for a, b in zip(before[:2], after[:2], strict=True)) and before[2] == after[2] == 0


def test_what_tokens_do_not_determine_stays():
    """With fewer tokens than neurons the outputs on them are met, and orthogonal directions keep the average."""
    segments = make_segments(width=6)
    layer = observe(segments, make_routing(tokens=3))
    hidden, averaged = sample_tokens(layer), average_groups(segments, GROUPING, WEIGHTS)
    fitted = fit_group_outputs(layer, hidden, GROUPING, WEIGHTS, averaged)
    assert max(group_errors(layer, hidden, fitted)) < 1e-6
    p = neuron_activations(averaged, 0, hidden, activation)  # (3, 6)
    outside = torch.eye(6, dtype=torch.float64) - torch.linalg.pinv(p) @ p
    assert_near(outside @ fitted.down[0], outside @ averaged.down[0], 1e-8)  # LAPACKs differ by 1.4e-9


def test_rounding_makes_no_system_indefinite():
    """Wide experts in float32 on few tokens: their outputs on these are met more closely than by the averages."""
    segments = make_segments(width=700, hidden=64, output=8, dtype=torch.float32)
    layer = observe(segments, make_routing(tokens=60, hidden=64, dtype=torch.float32))
    hidden, averaged = sample_tokens(layer), average_groups(segments, GROUPING, WEIGHTS)
    fitted = fit_group_outputs(layer, hidden, GROUPING, WEIGHTS, averaged)
    before, after = group_errors(layer, hidden, averaged), group_errors(layer, hidden, fitted)
    assert all(b < 0.05 * a for a, b in zip(before[:2], after[:2], strict=True))


def test_no_token_to_fit():
    """The averages stay as they are."""
    segments = make_segments()
    layer = observe(segments, make_routing(tokens=4), held_out=torch.ones(4, dtype=torch.bool))
    averaged = average_groups(segments, GROUPING, WEIGHTS)
    fitted = fit_group_outputs(layer, sample_tokens(layer), GROUPING, WEIGHTS, averaged)
    assert torch.equal(fitted.down, averaged.down)


def test_output_fit_of_two_processes():
    """The normal equations are summed over the tokens of all processes."""
    segments, routing = make_segments(), make_routing(tokens=40)
    averaged = average_groups(segments, GROUPING, WEIGHTS)

    def fit(part, reduce):
        layer = observe(segments, routing.select(part), reduce=reduce)
        return fit_group_outputs(layer, routing.hidden[part], GROUPING, WEIGHTS, averaged).down

    sums = []
    fit(slice(15), lambda local, operation="sum": sums.append(local.clone()) or local)
    pending = iter(sums)
    actual = fit(slice(15, None), lambda local, operation="sum": local + next(pending))
    assert_near(actual, fit(slice(None), lambda local, operation="sum": local), 1e-8)
