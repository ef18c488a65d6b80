"""The neuron refit against the same descent written out slowly, with gradients by autograd."""

from itertools import islice

import pytest
import torch
from samples import KINDS, activation, assert_near, assert_unchanged, copies, in_chunks, make_routing, make_segments

from optimum_dern.core.layer.mixture import routed_output
from optimum_dern.core.layer.workspace import Workspace
from optimum_dern.core.refits import neurons as neuron_refit
from optimum_dern.core.refits.neurons import count_passes, count_steps, descend_neurons


def problem(kind="gated", tokens=30, **routing):
    """A small layer, its tokens, and the output of a layer like it, which is there to be found."""
    segments, routing = make_segments(kind), make_routing(tokens=tokens, **routing)
    generator = torch.Generator().manual_seed(5)
    other = [
        None if part is None else part + 0.2 * torch.randn(part.shape, generator=generator, dtype=part.dtype)
        for part in segments[:3]
    ]
    return (
        segments,
        routing,
        routed_output(segments._replace(gate=other[0], up=other[1], down=other[2]), routing, activation),
    )


def dense_output(parts, segments, routing):
    """The routed output, every expert on every token; differentiable."""
    x = torch.cat([routing.hidden, torch.ones(len(routing.hidden), 1)], 1) if segments.biased else routing.hidden
    *gate, up, down = parts
    before = torch.einsum("efd,td->tef", gate[0], x) if gate else None
    neurons = activation(before, torch.einsum("efd,td->tef", up, x))
    outputs = torch.einsum("tef,efo->teo", neurons, down)
    if segments.output_bias is not None:
        outputs = outputs + segments.output_bias
    weights = torch.zeros(len(x), len(up), dtype=x.dtype).scatter(1, routing.index, routing.weight)
    return torch.einsum("te,teo->to", weights, outputs)


def descended(segments, routing, target, passes, **options):
    """The layer after some passes."""
    return next(islice(descend_neurons(segments, routing, target, activation, **options), passes - 1, None))


def slow_descent(segments, routing, target, passes, rate, seed=0):
    """Adafactor with momentum on half the squared error, over minibatches of a permutation; the mean of the steps."""
    parts = [part.clone().requires_grad_() for part in segments[:3] if part is not None]
    sizes = [part.detach().square().mean().sqrt() for part in parts]
    steps, averages = [torch.zeros_like(p) for p in parts], [p.detach().clone() for p in parts]
    rows, columns = [0.0] * len(parts), [0.0] * len(parts)
    per_pass = count_steps(len(target), len(segments.up) // routing.index.shape[1])
    generator, number = torch.Generator().manual_seed(seed), 0
    for _ in range(passes):
        place = torch.randperm(len(target), generator=generator)
        for batch in range(per_pass):
            tokens = [t for t in range(len(target)) if place[t].item() * per_pass // len(target) == batch]
            error = dense_output(parts, segments, routing.select(tokens)) - target[tokens]
            gradients = torch.autograd.grad(error.square().sum() / 2, parts)
            number += 1
            with torch.no_grad():
                for p, gradient in enumerate(gradients):
                    rows[p] = 0.95 * rows[p] + 0.05 * (gradient**2).mean(2, keepdim=True)
                    columns[p] = 0.95 * columns[p] + 0.05 * (gradient**2).mean(1, keepdim=True)
                    row, column = rows[p] / (1 - 0.95**number), columns[p] / (1 - 0.95**number)
                    mean = row.mean(1, keepdim=True)  # of one expert
                    step = gradient / (row / mean + 1e-300).sqrt().add(0.1) / (column.sqrt() + 0.1 * mean.sqrt())
                    steps[p] = 0.8 * steps[p] + 0.2 * step.nan_to_num()
                    parts[p] -= rate * sizes[p] * steps[p]
                    kept = max(1 / number, 1 / (1.5 * per_pass))
                    averages[p] += kept * (parts[p] - averages[p])
    return averages


@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_descent(kind, monkeypatch):
    """Every projection comes out as from the formulas, over several minibatches a pass."""
    monkeypatch.setattr(neuron_refit, "SMALLEST_BATCH", 8)
    monkeypatch.setattr(neuron_refit, "ENOUGH_PER_EXPERT", 1)
    segments, routing, target = problem(kind)
    found = descended(segments, routing, target, passes=3, rate=0.05)
    expected = slow_descent(segments, routing, target, passes=3, rate=0.05)
    for part, value in zip([part for part in found[:3] if part is not None], expected, strict=True):
        assert_near(part, value, 1e-8)


def test_it_finds_a_layer_that_is_there(monkeypatch):
    """The error of a disturbed layer falls by an order of magnitude."""
    monkeypatch.setattr(neuron_refit, "SMALLEST_BATCH", 20)
    monkeypatch.setattr(neuron_refit, "ENOUGH_PER_EXPERT", 1)
    segments, routing, target = problem(tokens=400)
    found = descended(segments, routing, target, passes=30)
    before = (routed_output(segments, routing, activation) - target).square().sum()
    assert (routed_output(found, routing, activation) - target).square().sum() < 0.1 * before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_same_minibatches(count):
    """Whoever holds which token, a minibatch has the same ones, and a pass has each once, with its own routing."""
    routing = make_routing(tokens=50)

    def passes(order):
        own, generator = routing.select(order), torch.Generator().manual_seed(3)
        made = [batch for _ in range(2) for batch in neuron_refit._minibatches(order, 50, 4, own, 6, generator)]
        assert all(torch.equal(routed.index, own.index[tokens]) for tokens, routed in made)
        return [tokens for tokens, _ in made]

    whole = passes(torch.arange(50))
    assert sorted(torch.cat(whole[:4]).tolist()) == list(range(50)) and len(whole) == 8
    assert not torch.equal(whole[0], whole[4])
    shared = [[] for _ in range(8)]
    for rank in range(count):
        order = torch.arange(50)[rank::count]
        for number, batch in enumerate(passes(order)):
            shared[number] += order[batch].tolist()
    assert [sorted(batch) for batch in shared] == [batch.tolist() for batch in whole]


def test_few_tokens_get_smaller_minibatches():
    """Steps a pass: 1 for hardly any token, 32 of at least 64 tokens, then of 1024; of more for many experts."""
    assert [count_passes(n) for n in (0, 1000, 102_400, 250_000, 10**6)] == [10, 10, 10, 6, 2]
    assert [count_steps(n) for n in (0, 10, 640, 4096, 32768, 65536)] == [1, 1, 5, 32, 32, 64]
    assert [count_steps(n, 16) for n in (640, 4096, 32768, 65536)] == [1, 2, 16, 32]


def test_chunks_change_nothing():
    """Tokens in chunks of three give the same steps."""
    segments, routing, target = problem()
    whole = descended(segments, routing, target, passes=2)
    parts = descended(in_chunks(segments, 3), routing, target, passes=2)
    for part, other in zip(parts[:3], whole[:3], strict=True):
        assert_near(part, other, 1e-8)


@pytest.mark.parametrize("max_elements", [0, 150, 1 << 20])
def test_few_messages(max_elements):
    """Gradients are summed over the processes for as many experts at a time as fit, to the same result."""
    segments, routing, target = problem()
    sizes = []

    def reduce(local, operation="sum"):
        sizes.append(local.numel())
        return local

    bounded = segments._replace(workspace=Workspace(max_elements=max_elements))
    found = descended(bounded, routing, target, passes=1, reduce=reduce)
    one = 5 * (4 + 4 + 3)  # an expert's numbers
    assert sizes[2:] == {0: [one] * 6, 150: [2 * one] * 3, 1 << 20: [6 * one]}[max_elements]
    for part, other in zip(found[:3], descended(segments, routing, target, passes=1)[:3], strict=True):
        assert torch.equal(part, other)


def test_experts_without_tokens_and_inputs_stay():
    """An expert that no token reaches keeps its bits, and nothing is modified in place."""
    segments, routing, target = problem(unused=(2,))
    before = copies(segments, routing)
    found = descended(segments, routing, target, passes=2)
    for old, new in zip(segments[:3], found[:3], strict=True):
        assert torch.equal(new[2], old[2]) and not torch.equal(new[0], old[0])
    assert_unchanged(before, segments, routing)


def test_a_process_without_tokens():
    """No token, no step, and no error."""
    segments, routing, target = problem()
    found = descended(segments, routing.select(slice(0)), target[:0], passes=2)
    assert all(torch.equal(old, new) for old, new in zip(segments[:3], found[:3], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_huge_outputs(kind):
    """Outputs whose gradients have squares beyond float32 are fitted to the bit like others of another scale."""
    segments, routing, target = problem(kind)
    names = ("gate", "up", "down", "output_bias")
    single = {name: part.float() for name in names if (part := getattr(segments, name)) is not None}
    segments = segments._replace(**single)
    routing, target = routing._replace(hidden=routing.hidden.float(), weight=routing.weight.float()), target.float()
    scale, bias = 2.0**40, segments.output_bias
    huge = segments._replace(down=scale * segments.down, output_bias=None if bias is None else scale * bias)
    plain, found = descended(segments, routing, target, 3), descended(huge, routing, scale * target, 3)
    assert torch.equal(found.down / scale, plain.down) and torch.equal(found.up, plain.up)
    assert found.down.isfinite().all() and not torch.equal(found.down, huge.down)
