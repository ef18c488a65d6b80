"""Sums per expert: parity, merging, chunks."""

from dataclasses import fields

import pytest
import torch
from live_bytes import LiveBytes
from reference import reference_layer_output, reference_statistics
from samples import (
    KINDS,
    TOLERANCE,
    activation,
    assert_near,
    assert_unchanged,
    copies,
    in_chunks,
    make_routing,
    make_segments,
    reference_arguments,
)

from optimum_dern.core.layer.cost import LayerShape
from optimum_dern.core.layer.statistics import ExpertStatistics, measure_experts, measure_experts_cost


def assert_same(actual, expected, tolerance):
    """Every sum agrees, and all of them are float64."""
    assert actual.tokens == expected["tokens"]
    for name in (f.name for f in fields(actual) if f.name != "tokens"):
        assert getattr(actual, name).dtype == torch.float64
        assert_near(getattr(actual, name), expected[name], tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("top_k", [1, 3])
def test_sums_match_the_reference(kind, dtype, top_k):
    """All sums of the layer and its output, with one expert that no token reaches, and no input written to."""
    segments = make_segments(kind, dtype=dtype)
    routing = make_routing(top_k=top_k, dtype=dtype, unused=[2])
    before = copies(segments, routing)
    positional, named = reference_arguments(segments, routing)
    expected = reference_statistics(*positional, **named)
    actual, routed = measure_experts(segments, routing, activation)
    assert_same(actual, expected, TOLERANCE[dtype])
    assert routed.dtype == dtype
    assert_near(routed, reference_layer_output(*positional, **named), TOLERANCE[dtype])
    assert expected["count"][2] == 0
    assert_unchanged(before, segments, routing)


@pytest.mark.parametrize("kind", KINDS)
def test_halves_merge_to_the_whole(kind):
    """Statistics of two unequal parts of the tokens add up to those of all of them."""
    segments, routing = make_segments(kind), make_routing(tokens=15)
    parts = [measure_experts(segments, routing.select(p), activation)[0] for p in (slice(0, 4), slice(4, 15))]
    before = [copies([getattr(part, f.name) for f in fields(part)]) for part in parts]
    whole = measure_experts(segments, routing, activation)[0]
    assert_same(parts[0].merge(parts[1]), vars(whole), 1e-12)
    for part, saved in zip(parts, before, strict=True):
        assert_unchanged(saved, [getattr(part, f.name) for f in fields(part)])


def test_zeros_are_neutral():
    """Merging with no tokens at all changes no bit, from either side."""
    statistics = measure_experts(make_segments(), make_routing(), activation)[0]
    nothing = ExpertStatistics.zeros(6, 3)
    for merged in (statistics.merge(nothing), nothing.merge(statistics)):
        assert merged.tokens == 12
        for f in fields(merged)[1:]:
            assert torch.equal(getattr(merged, f.name), getattr(statistics, f.name))


def test_no_tokens_measure_as_zeros():
    """An empty batch has the statistics of no tokens, and both are float64."""
    empty = make_routing().select(slice(0, 0))
    (measured, routed), zeros = measure_experts(make_segments(), empty, activation), ExpertStatistics.zeros(6, 3)
    assert_same(measured, vars(zeros), 0.0)
    assert_same(zeros, vars(measured), 0.0)
    assert routed.shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    """Neither the sums nor the output depend on the chunk length."""
    segments, routing = make_segments(kind), make_routing(tokens=20)
    whole, routed = measure_experts(segments, routing, activation)
    actual, again = measure_experts(in_chunks(segments, 2), routing, activation)
    assert_same(actual, vars(whole), 1e-12)
    assert_near(again, routed, 1e-12)


def test_many_experts_take_no_memory_for_each_token():
    """Beside the output nothing grows with tokens times experts, and the memory is what its cost says."""
    tokens, experts = 20_000, 256
    segments = in_chunks(make_segments(experts=experts, dtype=torch.float32), 1024)
    routing = make_routing(experts, tokens, dtype=torch.float32)
    with LiveBytes() as live:
        _, routed = measure_experts(segments, routing, activation)
    shape = LayerShape(tokens, experts, experts, 2, width=5, inputs=4, outputs=3, chunk_tokens=1024)
    assert 0.85 < (live.peak - routed.nbytes) / measure_experts_cost(shape).held < 1.15
    assert live.peak < 0.5 * tokens * experts * 4


def test_sums_of_one_token_by_hand():
    """One token, two experts of one neuron without activation: every sum worked out on paper."""
    segments = make_segments("plain", experts=3, width=1, hidden=1, output=2)._replace(
        up=torch.tensor([[[1.0]], [[2.0]], [[9.0]]]).double(),
        down=torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]], [[9.0, 9.0]]]).double(),
    )
    routing = make_routing(experts=3, tokens=1, hidden=1)._replace(
        hidden=torch.tensor([[2.0]]).double(),
        index=torch.tensor([[1, 0]]),
        weight=torch.tensor([[0.5, 0.25]]).double(),
    )
    actual, routed = measure_experts(segments, routing, lambda gate, up: up)  # e_0 = (6, 8), e_1 = (0, 4)
    assert routed.tolist() == [[1.5, 4]]
    assert actual.tokens == 1 and actual.count.tolist() == [1, 1, 0]
    assert actual.weight.tolist() == [0.25, 0.5, 0]
    assert actual.output_norm.tolist() == [10, 4, 0]
    assert actual.output_norm_squared.tolist() == [100, 16, 0]
    assert actual.weighted_output_norm.tolist() == [2.5, 2, 0]
    assert actual.output_sum.tolist() == [[6, 8], [0, 4], [0, 0]]
    assert actual.coactivation.tolist() == [[6.25, 5, 0], [5, 4, 0], [0, 0, 0]]
    assert actual.together.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert actual.output_max.tolist() == [8, 4, 0]


def test_maxima_merge_as_maxima():
    """The largest output of two sets of tokens is that of one of them, and processes are asked for it as such."""
    segments, routing = make_segments(), make_routing(tokens=15)
    first, second = (measure_experts(segments, routing.select(p), activation)[0] for p in (slice(0, 6), slice(6, 15)))
    assert torch.equal(first.merge(second).output_max, torch.maximum(first.output_max, second.output_max))
    asked = []

    def reduce(local, operation="sum"):
        asked.append(operation)
        return local

    assert_same(first.reduced(reduce), vars(first), 0.0)
    assert asked == ["sum"] * (len(fields(first)) - 1) + ["max"]


def test_late_tokens_do_not_drown():
    """Merging keeps small sums next to large ones, as float32 would not."""
    small = measure_experts(make_segments(dtype=torch.float32), make_routing(dtype=torch.float32), activation)[0]
    large = ExpertStatistics(10**9, *(torch.full_like(getattr(small, f.name), 1e9) for f in fields(small)[1:]))
    merged = large.merge(small)
    assert merged.tokens == 10**9 + 12
    assert_near(merged.weight - 1e9, small.weight, 1e-6)
    assert_near(merged.coactivation - 1e9, small.coactivation, 1e-6)
