"""Other ways to recombine segments: what leaves a layer's output as it is, and the rules against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from observed import observe
from reference import reference_neurons, silu
from samples import PROPERTY, activation, assert_near, make_routing, make_segments, scores_for

from optimum_dern import DernConfig
from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.methods import LayerProblem, get_method


GATED = st.sampled_from(["gated", "biased"])
SEEDS = st.integers(0, 10_000)
WIDTH = 5


@pytest.fixture(scope="module")
def rules(script):
    return script("segment_rules")


def make_layer(seed, held_out=True, kind="gated"):
    """Six experts of width 5 and 30 tokens, of which every fifth is held out where it is asked for."""
    routing = make_routing(tokens=30, seed=seed + 1)
    marked = torch.arange(30) % 5 == 4 if held_out else None
    return observe(make_segments(kind, seed=seed), routing, held_out=marked)


def neurons_of(layer, expert, tokens):
    """h(x) of one expert for some tokens, by loops: (tokens, f) lists."""
    segments = layer.segments
    hidden = [layer.routing.hidden[token] for token in tokens]
    return [reference_neurons(segments.gate, segments.up, expert, x, silu, segments.biased) for x in hidden]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@PROPERTY
@given(kind=GATED, seed=SEEDS)
def test_balancing_changes_no_output(rules, kind, seed):
    """|u| = |d| for every segment, and the layer computes what it did."""
    segments, routing = make_segments(kind, seed=seed), make_routing(seed=seed + 1)
    balanced = rules.balanced(segments)
    assert_near(balanced.up.norm(dim=-1), balanced.down.norm(dim=-1))
    assert_near(balanced.up.norm(dim=-1) ** 2, segments.up.norm(dim=-1) * segments.down.norm(dim=-1))
    assert_near(routed_output(balanced, routing, activation), routed_output(segments, routing, activation))


@PROPERTY
@given(kind=GATED, seed=SEEDS, data=st.data())
def test_signs_and_order_change_no_output(rules, kind, seed, data):
    """(-u, -d) is the segment (u, d), and an expert is the sum of its segments in any order."""
    segments, routing = make_segments(kind, seed=seed), make_routing(seed=seed + 1)
    result = segments.select(torch.arange(6))
    for expert in range(6):
        neuron = torch.tensor(data.draw(st.permutations(range(WIDTH))))
        sign = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=WIDTH, max_size=WIDTH)))
        rules.write(result, expert, rules.join(segments, torch.full((WIDTH,), expert), neuron, sign.double()))
    assert_near(routed_output(result, routing, activation), routed_output(segments, routing, activation))


@PROPERTY
@given(kind=GATED, seed=SEEDS, held_out=st.booleans(), some=st.booleans())
def test_energies(rules, kind, seed, held_out, some):
    """Sum of (g h)^2 |d|^2 over the tokens that reached the expert and may be fitted, or some of these."""
    layer = make_layer(seed, held_out, kind)
    among = torch.arange(30) % 2 == 0 if some else None
    expected = torch.zeros(6, WIDTH, dtype=torch.float64)
    for token in range(30):
        if layer.held_out[token] or (some and not among[token]):
            continue
        for expert, weight in zip(
            layer.routing.index[token].tolist(), layer.routing.weight[token].tolist(), strict=True
        ):
            for j, h in enumerate(neurons_of(layer, expert, [token])[0]):
                length = sum(v * v for v in layer.segments.down[expert, j].tolist())
                expected[expert, j] += (weight * h) ** 2 * length
    assert_near(rules.energies(layer, among), expected)


@PROPERTY
@given(seed=SEEDS, held_out=st.booleans())
def test_nearest_outputs(rules, seed, held_out):
    """Every dropped segment finds the retained one whose output is most like its own, up to the sign."""
    layer, retained = make_layer(seed, held_out), [1, 2, 5]
    tokens = [token for token in range(30) if not layer.held_out[token]]
    activations = [list(zip(*neurons_of(layer, expert, tokens), strict=True)) for expert in range(6)]
    down = layer.segments.down.tolist()
    found = rules.nearest_outputs(layer, torch.tensor(retained))
    rows = iter(zip(*(part.tolist() for part in found), strict=True))
    for expert in (0, 3, 4):
        for j in range(WIDTH):
            together = {
                (position, k): cosine(activations[expert][j], activations[kept][k])
                for position, kept in enumerate(retained)
                for k in range(WIDTH)
            }
            alike = {(p, k): c * cosine(down[expert][j], down[retained[p]][k]) for (p, k), c in together.items()}
            position, k = max(alike, key=alike.get)
            source, neuron, best, place, sign = next(rows)
            assert (source, neuron, place) == (expert, j, position * WIDTH + k)
            assert best == pytest.approx(alike[position, k], abs=1e-10)
            assert sign == math.copysign(1, together[position, k])
    assert next(rows, None) is None


@PROPERTY
@given(seed=SEEDS)
def test_copies_are_nearest_to_themselves(rules, seed):
    """A segment that a retained expert has too, scaled and turned, is found there with cosine 1 and its sign."""
    layer = make_layer(seed)
    segments = layer.segments
    for part, factor in ((segments.gate, 1.0), (segments.up, -2.0), (segments.down, -3.0)):
        part[0, 3] = factor * part[2, 1]
    source, neuron, best, place, sign = rules.nearest_outputs(observe(segments, layer.routing), torch.tensor([1, 2]))
    at = int(((source == 0) & (neuron == 3)).nonzero())
    assert (place[at].item(), sign[at].item()) == (WIDTH + 1, -1.0)
    assert best[at].item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["kmeans, canonical", "function space", "choose", "choose, function space"])
def test_nothing_moves_above_every_cosine(rules, name):
    """Where no segment is alike enough, every rule gives what pruning gives."""
    layer, retained = make_layer(3), torch.tensor([1, 2, 5])
    problem = LayerProblem(layer, scores_for(), retained)
    config = DernConfig(method=name, similarity_threshold=2.0, cluster_init="own")
    pruned, recombined = get_method(name).compress_layer(problem, config).values()
    routing = layer.routing._replace(index=layer.routing.index % 3)
    outputs = [routed_output(candidate.segments, routing, activation) for candidate in (pruned, recombined)]
    assert_near(outputs[1], outputs[0])


def test_the_best_of_those_routed_together(rules):
    """Every retained expert gets the segments of most energy on the tokens that reached it, whoever's they are."""
    layer, retained = make_layer(4), torch.tensor([0, 3])
    problem = LayerProblem(layer, scores_for(), retained)
    segments = get_method("choose, routed together").compress_layer(problem, DernConfig())["recombined"].segments
    for position, expert in enumerate(retained.tolist()):
        energy = rules.energies(layer, (layer.routing.index == expert).any(1)).flatten()
        chosen = sorted(range(len(energy)), key=lambda i: -energy[i])[:WIDTH]
        expected = [layer.segments.concatenated(i // WIDTH)[i % WIDTH].tolist() for i in chosen]
        assert segments.concatenated(position).tolist() == expected
