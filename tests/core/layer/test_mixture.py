"""Neuron activations, the walk over routed tokens, and the routed sum."""

from contextlib import contextmanager

import pytest
import torch
from reference import reference_layer_output, reference_neurons
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
    scalar_activation,
)

from optimum_dern.core.layer.mixture import Routing, expert_batches, expert_output, neuron_activations, routed_output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_neuron_activations_match_the_reference(kind, dtype):
    """h(x) = act(G x) * (U x), with the bias column read by a constant one."""
    segments, routing = make_segments(kind, dtype=dtype), make_routing(dtype=dtype)
    actual = neuron_activations(segments, 3, routing.hidden, activation)
    act = scalar_activation(segments)
    expected = [reference_neurons(segments.gate, segments.up, 3, x, act, segments.biased) for x in routing.hidden]
    assert actual.dtype == dtype
    assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("top_k", [1, 3])
def test_routed_output_matches_the_reference(kind, dtype, top_k):
    """y(x) is the weighted sum of the chosen experts' outputs, and no input is written to."""
    segments, routing = make_segments(kind, dtype=dtype), make_routing(top_k=top_k, dtype=dtype)
    before = copies(segments, routing)
    positional, named = reference_arguments(segments, routing)
    actual = routed_output(segments, routing, activation)
    assert actual.dtype == dtype
    assert_near(actual, reference_layer_output(*positional, **named), TOLERANCE[dtype])
    assert_unchanged(before, segments, routing)


def test_segments_set_the_dtype():
    """Tokens recorded in a lower precision are computed in the dtype of the segments."""
    segments, routing = make_segments(), make_routing(dtype=torch.bfloat16)
    positional, named = reference_arguments(segments, routing)
    actual = routed_output(segments, routing, activation)
    assert actual.dtype == torch.float64
    assert_near(actual, reference_layer_output(*positional, **named))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_cover_every_slot_once(kind):
    """Each chosen slot appears in exactly one batch, with its own weight, in chunks of bounded length."""
    segments, routing = in_chunks(make_segments(kind), 3), make_routing(tokens=20)
    seen = []
    for batch in expert_batches(segments, routing, activation):
        assert 0 < len(batch.token) <= 3
        assert torch.equal(routing.index[batch.token, batch.slot], torch.full_like(batch.token, batch.expert))
        assert torch.equal(routing.weight[batch.token, batch.slot], batch.weight.squeeze(1))
        expected = neuron_activations(segments, batch.expert, routing.hidden[batch.token], activation)
        assert_near(batch.neurons, expected)
        seen += list(zip(batch.token.tolist(), batch.slot.tolist(), strict=True))
    assert sorted(seen) == [(t, k) for t in range(20) for k in range(2)]


@pytest.mark.parametrize("experts", [None, [3, 0, 5]])
def test_batches_keep_the_order_of_tokens(experts):
    """Within an expert tokens come as they stand in the routing, whether all experts are visited or a few."""
    segments, routing = in_chunks(make_segments(), 4), make_routing(tokens=50, top_k=3, unused=[2])
    seen = {}
    for batch in expert_batches(segments, routing, activation, experts):
        seen.setdefault(batch.expert, []).append(torch.stack([batch.token, batch.slot]))
    assert list(seen) == (experts or [0, 1, 3, 4, 5])
    for expert, parts in seen.items():
        assert torch.equal(torch.cat(parts, dim=1), torch.stack(torch.where(routing.index == expert)))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    """The routed sum does not depend on the chunk length."""
    segments, routing = make_segments(kind), make_routing(tokens=20)
    whole = routed_output(segments, routing, activation)
    assert_near(routed_output(in_chunks(segments, 2), routing, activation), whole, 1e-12)


def test_only_some_experts():
    """A list of experts restricts the walk; experts without tokens yield nothing."""
    segments, routing = make_segments(), make_routing(unused=[4])
    visited = [batch.expert for batch in expert_batches(segments, routing, activation, [5, 4, 0])]
    assert visited == [5, 0]
    assert 4 not in [batch.expert for batch in expert_batches(segments, routing, activation)]


def test_no_tokens():
    """An empty batch gives an empty output of the right width."""
    routing = make_routing().select(torch.zeros(12, dtype=torch.bool))
    assert routed_output(make_segments(), routing, activation).shape == (0, 3)


@pytest.mark.parametrize("kind", ["biased", "plain biased"])
def test_output_bias_is_weighted_with_its_expert(kind):
    """With zero down projections the layer is the routed sum of the output biases."""
    segments, routing = make_segments(kind), make_routing()
    segments = segments._replace(down=torch.zeros_like(segments.down))
    expected = [(routing.weight[t, :, None] * segments.output_bias[routing.index[t]]).sum(0) for t in range(12)]
    assert_near(routed_output(segments, routing, activation), torch.stack(expected))


def test_expert_output_leaves_out_the_weight():
    """The output of a batch is the down projection of its neurons, before the routing weight."""
    segments, routing = make_segments(), make_routing()
    halved = routing._replace(weight=routing.weight / 2)
    pairs = zip(*(expert_batches(segments, r, activation) for r in (routing, halved)), strict=True)
    for batch, half in pairs:
        assert torch.equal(expert_output(segments, batch), expert_output(segments, half))
        assert_near(expert_output(segments, batch), batch.neurons @ segments.down[batch.expert])


def test_select_tokens():
    """Tokens can be taken by mask, by index or by slice, all three tensors alike."""
    routing = make_routing()
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[2, 7]] = True
    selected = [routing.select(tokens) for tokens in (mask, torch.tensor([7, 2]), slice(2, 4))]
    for part, by_mask, by_index, by_slice in zip(*(r[:3] for r in (routing, *selected)), strict=True):
        assert torch.equal(by_mask, torch.stack([part[2], part[7]]))
        assert torch.equal(by_index, torch.stack([part[7], part[2]]))
        assert torch.equal(by_slice, part[2:4])
    assert isinstance(routing.select(mask), Routing)


@pytest.mark.parametrize("weighs_input", [False, True])
def test_parts_make_a_whole(weighs_input):
    """Parts of a routing put together again are the routing, whichever side its weights are on."""
    routing = make_routing()._replace(weighs_input=weighs_input)
    whole = Routing.concatenate([routing.select(slice(0, 5)), routing.select(slice(5, 12))])
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], routing[:3], strict=True))
    assert whole.weighs_input is weighs_input


def test_experts_run_in_the_products_of_their_workspace():
    """Both halves of an expert's run enter the context that the workspace gives for the device."""
    entered = []

    @contextmanager
    def products(device):
        entered.append(device.type)
        yield

    segments, routing = make_segments(), make_routing()
    segments = segments._replace(workspace=segments.workspace._replace(products=products))
    routed_output(segments, routing, activation)
    batches = list(expert_batches(segments, routing, activation))
    assert entered == ["cpu"] * 3 * len(batches)  # each batch twice, and its neurons once more
