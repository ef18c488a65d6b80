"""The greedy search of condensed layers, against its definition in loops."""

import math
from dataclasses import replace

import pytest
import torch
from observed import in_processes, observe
from reference import reference_expert_output
from samples import KINDS, assert_near, make_routing, make_segments, scalar_activation
from scipy.spatial.distance import jensenshannon

from optimum_dern.core.merging import condense
from optimum_dern.core.merging.condense import condense_experts, jensen_shannon, mean_weights
from optimum_dern.core.merging.sampling import sampled


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shared", "protected"), [(False, ()), (True, ()), (True, (5,))])
def test_against_loops(kind, shared, protected):
    segments, routing = make_segments(kind), make_routing(tokens=20, unused=(4,))
    segments.down.mul_(0.05)  # else the softmax is 1 for one number, and experts are equally good
    held_out = torch.arange(20) % 5 == 4
    beside = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if shared else None
    layer = observe(segments, routing, held_out=held_out, beside=beside)
    beside = torch.zeros(20, 3) if beside is None else beside
    weights = [[] for _ in range(6)]
    for index, weight in zip(routing.index.tolist(), routing.weight.tolist(), strict=True):
        for expert, g in zip(index, weight, strict=True):
            weights[expert].append(g)
    means = [sum(values) / max(1, len(values)) for values in weights]
    assert_near(mean_weights(layer), means)
    outputs = [
        [
            reference_expert_output(
                *segments[:3], e, x, scalar_activation(segments), segments.output_bias, segments.biased
            )
            for x in routing.hidden
        ]
        for e in range(6)
    ]
    chosen = list(protected)
    while len(chosen) < 3:
        found = {}
        for expert in (e for e in range(6) if e not in chosen):
            found[expert] = 0.0
            for token in (t for t in range(20) if not held_out[t]):
                sums = [sum(means[e] * outputs[e][token][k] for e in (*chosen, expert)) for k in range(3)]
                given = [(part + beside[token]).tolist() for part in (layer.target[token], torch.tensor(sums))]
                found[expert] += jensenshannon(*map(softmax, given)) ** 2
        chosen.append(min(found, key=found.get))
    assert condense_experts(layer, 3, protected) == chosen


def test_jensen_shannon_against_scipy():
    first, second = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [jensenshannon(a, b) ** 2 for a, b in zip(first.softmax(1), second.softmax(1), strict=True)]
    assert_near(jensen_shannon(first, second), torch.tensor(expected), 1e-5)
    assert_near(jensen_shannon(first, first), torch.zeros(7), 1e-6)


def test_many_tokens_are_sampled(monkeypatch):
    """Evenly spaced ones, those of all processes together; all processes find the same experts."""
    layer, seen = observe(make_segments(), make_routing(tokens=50)), []
    assert sampled(layer, 10).nonzero().flatten().tolist() == list(range(0, 50, 5))
    monkeypatch.setattr(condense, "TOKENS", 10)
    measure = condense.jensen_shannon
    monkeypatch.setattr(condense, "jensen_shannon", lambda a, b: (seen.append(len(a)), measure(a, b))[1])
    expected = condense_experts(layer, 2)
    assert len(set(expected)) == 2 and set(seen) == {10}

    def part(rank, reduce):
        rows = torch.arange(50)[rank::2]
        fields = {"target": layer.target[rows], "held_out": layer.held_out[rows], "order": rows, "reduce": reduce}
        return condense_experts(replace(layer, routing=layer.routing.select(rows), **fields), 2)

    assert in_processes(2, part) == [expected] * 2
    assert seen.count(5) == len(seen) - seen.count(10) == 2 * seen.count(10)
