"""Permutation alignment: the exact optimum, and neurons found again after a shuffle."""

from itertools import permutations

import pytest
import torch
from observed import in_processes, observe
from samples import KINDS, activation, assert_near, in_chunks, make_routing, make_segments

from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.merging.alignment import match_neurons, unit_distances, weight_cosines, weight_products
from optimum_dern.core.merging.all_experts import (
    activation_cosines,
    logit_cosines,
    mean_outputs,
    router_logits,
    sample_tokens,
)


SHUFFLE = torch.tensor([3, 0, 4, 1, 2])


def random(*shape, seed=7):
    """Normal numbers, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled_copy(kind="gated"):
    """Six experts of which the last is the first with its neurons in another order."""
    segments = make_segments(kind)
    for part in segments[:3]:
        if part is not None:
            part[5] = part[0][SHUFFLE]
    return segments


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_of_all_permutations(seed):
    """No permutation costs less."""
    cost = random(5, 5, seed=seed)
    total = {p: sum(cost[i, j].item() for i, j in enumerate(p)) for p in permutations(range(5))}
    found = tuple(match_neurons(cost).tolist())
    assert total[found] == pytest.approx(min(total.values()))


def test_distances_of_unit_vectors():
    """They follow from the cosines, also where rounding puts one above 1."""
    vectors = torch.nn.functional.normalize(random(4, 3), dim=1)
    assert_near(unit_distances(vectors @ vectors.T), torch.cdist(vectors, vectors), 1e-7)
    assert unit_distances(torch.tensor([1 + 1e-12, -1.0])).tolist() == [0, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_against_loops(kind):
    """Products and cosines of gate|up|down, input biases included."""
    segments = make_segments(kind)
    for i in range(5):
        for j in range(5):
            a, b = (
                torch.cat([part[expert][neuron] for part in segments[:3] if part is not None])
                for expert, neuron in ((1, i), (2, j))
            )
            assert_near(weight_products(segments, 1, 2)[i, j], a @ b)
            assert_near(weight_cosines(segments, 1, 2)[i, j], (a @ b) / (a.norm() * b.norm()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["products", "cosines", "activations"])
def test_a_shuffled_copy_is_found_again(kind, by):
    """Whatever is compared, the permutation undoes the shuffle."""
    segments = shuffled_copy(kind)
    if by == "activations":
        layer = observe(segments, make_routing(tokens=40))
        cost = unit_distances(activation_cosines(layer, sample_tokens(layer), 0, 5))
    else:
        cost = -{"products": weight_products, "cosines": weight_cosines}[by](segments, 0, 5)
    assert torch.equal(SHUFFLE[match_neurons(cost)], torch.arange(5))


def reference_neurons(segments, expert, x):
    """h(x) of one expert for one token, in plain tensors."""
    x = torch.cat([x, torch.ones(1, dtype=x.dtype)]) if segments.biased else x
    gate = None if segments.gate is None else segments.gate[expert] @ x
    return activation(gate, segments.up[expert] @ x)


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_against_loops(kind):
    """Mean outputs, weighted or not, and cosines of activations: over all tokens, routed or not, in chunks."""
    segments, routing = in_chunks(make_segments(kind), 5), make_routing(tokens=12)
    layer, weights = observe(segments, routing), random(12, 6)
    hidden = sample_tokens(layer)
    for scale, given in ((torch.ones_like(weights), None), (weights, weights)):
        outputs = mean_outputs(layer, hidden, given)
        for expert in range(6):
            total = 0
            for x, w in zip(routing.hidden, scale[:, expert], strict=True):
                output = reference_neurons(segments, expert, x) @ segments.down[expert]
                output = output if segments.output_bias is None else output + segments.output_bias[expert]
                total = total + w * output
            assert_near(outputs[expert], total / 12)
    a, b = (torch.stack([reference_neurons(segments, e, x) for x in routing.hidden], dim=1) for e in (3, 1))
    assert_near(
        activation_cosines(layer, hidden, 3, 1), torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    )


def test_dead_neurons_resemble_nothing():
    """A neuron that never fires has cosine 0, not NaN."""
    segments = make_segments("plain")
    segments.up[2, 1] = 0
    layer = observe(segments, make_routing())
    cosines = activation_cosines(layer, sample_tokens(layer), 2, 0)
    assert not cosines[1].any() and cosines[0].any()


def test_router_logits_against_loops():
    """W x + b, and the cosine of every two experts' logits over all tokens."""
    rows, bias = random(6, 4), random(6)
    layer = observe(make_segments(), make_routing(), rows, router_bias=bias)
    hidden = sample_tokens(layer)
    logits = router_logits(layer, hidden)
    assert_near(logits, torch.stack([rows @ x + bias for x in hidden]))
    for i in range(6):
        for j in range(6):
            expected = torch.nn.functional.cosine_similarity(logits[:, i], logits[:, j], dim=0)
            assert_near(logit_cosines(layer, logits)[i, j], expected)


@pytest.mark.parametrize(("rows", "found"), [(None, "no single matrix"), (torch.ones(6, 7), "7 inputs where")])
def test_routers_without_comparable_logits(rows, found):
    """The message tells why, and which methods do without."""
    layer = observe(make_segments(), make_routing(), rows)
    with pytest.raises(ValueError, match=f"{found}.*choose method hc_smoe"):
        router_logits(layer, sample_tokens(layer))


def test_sampled_tokens():
    """Every n-th token that is not held out, no more than the limit."""
    routing = make_routing(tokens=25)
    held_out = torch.arange(25) % 5 == 4
    layer = observe(make_segments(), routing, held_out=held_out)
    fitted = routing.hidden[~held_out]
    assert torch.equal(sample_tokens(layer), fitted)
    assert torch.equal(sample_tokens(layer, 20), fitted)
    assert torch.equal(sample_tokens(layer, 19), fitted[::2])
    assert torch.equal(sample_tokens(layer, 7), fitted[::3])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("limit", [10, 33, 1000])
def test_processes_sample_what_one_process_samples(count, limit):
    """Micro-batches of unequal lengths, dealt out in turn: the same tokens, whoever holds them, none of them twice."""
    lengths = [40, 7, 33, 1, 60, 25, 18, 70, 46]
    total = sum(lengths)
    segments, routing = make_segments(), make_routing(tokens=total)
    held_out = torch.arange(total) % 7 == 3
    whole = sample_tokens(observe(segments, routing, held_out=held_out), limit)
    assert 0 < len(whole) <= limit

    def sample(rank, reduce):
        order = torch.cat(torch.arange(total).split(lengths)[rank::count])
        own = observe(segments, routing.select(order), held_out=held_out[order], order=order, reduce=reduce)
        return sample_tokens(own, limit)

    found = torch.cat(in_processes(count, sample))
    assert sorted(found.tolist()) == sorted(whole.tolist())


def test_processes_share_the_tokens():
    """Sums of two processes, added up, are those of one that has all tokens; one of them may have none."""
    segments, routing, rows = make_segments("gated"), make_routing(tokens=20), random(6, 4)
    whole = observe(segments, routing, rows)

    def results(layer):
        hidden = sample_tokens(layer)
        logits = router_logits(layer, hidden)
        return [mean_outputs(layer, hidden), activation_cosines(layer, hidden, 0, 1), logit_cosines(layer, logits)]

    for cut in (8, 20):
        asked = []  # what the second process contributes to each sum, in order

        def remember(local, operation="sum", asked=asked):
            asked.append(local.clone())
            return local

        results(observe(segments, routing.select(slice(cut, None)), rows, reduce=remember))
        pending = iter(asked)
        first = observe(
            segments,
            routing.select(slice(cut)),
            rows,
            reduce=lambda local, operation="sum", pending=pending: local + next(pending),
        )
        for actual, expected in zip(results(first), results(whole), strict=True):
            assert_near(actual, expected)


def test_experts_do_not_depend_on_the_order_of_their_neurons():
    """The identity that alignment rests on."""
    segments, routing = shuffled_copy(), make_routing()
    copies = routing._replace(index=torch.where(routing.index == 0, 5, routing.index))
    assert_near(routed_output(segments, copies, activation), routed_output(segments, routing, activation))
