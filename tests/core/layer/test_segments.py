"""Layouts of expert weights, the matrix form of segments, and the vectors that similarity is measured on."""

import itertools

import pytest
import torch
from reference import reference_similarity
from samples import KINDS, assert_near, assert_unchanged, copies, make_segments

from optimum_dern.core.layer.segments import (
    ExpertLayout,
    parameters_from_segments,
    segments_from_parameters,
    similarity_vectors,
)


LAYOUTS = [ExpertLayout(*flags) for flags in itertools.product([False, True], repeat=4)]
E, F, D, O = 2, 3, 4, 5  # noqa: E741


def stored_parameters(segments, layout):
    """The layer's weights put into the layout one number at a time."""
    rows = torch.zeros(E, 2 * F if layout.gated else F, D)
    bias = torch.zeros(rows.shape[:2])
    down = torch.zeros(E, O, F)
    for e, j in itertools.product(range(E), range(F)):
        gate_row, up_row = (2 * j, 2 * j + 1) if layout.interleaved else (j, F + j)
        targets = [(gate_row, segments.gate), (up_row, segments.up)] if layout.gated else [(j, segments.up)]
        for row, part in targets:
            for i in range(D):
                rows[e, row, i] = part[e, j, i]
            if layout.biased:
                bias[e, row] = part[e, j, D]
        for k in range(O):
            down[e, k, j] = segments.down[e, j, k]
    name = "gate_up_proj" if layout.gated else "up_proj"
    swap = (0, 2, 1) if layout.transposed else (0, 1, 2)
    parameters = {name: rows.permute(swap).contiguous(), "down_proj": down.permute(swap).contiguous()}
    if layout.biased:
        parameters |= {f"{name}_bias": bias, "down_proj_bias": segments.output_bias.clone()}
    return parameters


def segments_for(layout):
    """Random segments that the layout can store."""
    kind = next(kind for kind, flags in KINDS.items() if flags == (layout.gated, layout.biased))
    return make_segments(kind, E, F, D, O, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parameters_become_the_segments_they_were_built_from(layout):
    """Every number of a layer stored entry by entry is read back where it belongs."""
    expected = segments_for(layout)
    actual = segments_from_parameters(stored_parameters(expected, layout), layout)
    assert actual.biased is layout.biased
    for read, built in zip(actual[:4], expected[:4], strict=True):
        assert (read is None and built is None) or torch.equal(read, built)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_segments_become_the_parameters_of_the_layout(layout):
    """Writing gives the model's own names, shapes and bits, contiguous, and touches no input."""
    segments = segments_for(layout)
    before, expected = copies(segments), stored_parameters(segments, layout)
    actual = parameters_from_segments(segments, layout)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]) and value.is_contiguous()
    assert_unchanged(before, segments)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(layout, dtype):
    """Parameters to segments and back keep name, dtype and every bit."""
    parameters = {name: value.to(dtype) for name, value in stored_parameters(segments_for(layout), layout).items()}
    before = {name: value.clone() for name, value in parameters.items()}
    actual = parameters_from_segments(segments_from_parameters(parameters, layout), layout)
    assert actual.keys() == before.keys()
    for name, value in actual.items():
        assert (
            value.dtype == dtype and torch.equal(value, before[name]) and torch.equal(parameters[name], before[name])
        )


def test_interleaved_transposed_layout_by_hand():
    """Column 2j of a transposed interleaved projection is gate j, column 2j + 1 is up j; biases follow."""
    parameters = {
        "gate_up_proj": torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]),  # one input, two neurons
        "gate_up_proj_bias": torch.tensor([[10.0, 20.0, 30.0, 40.0]]),
        "down_proj": torch.tensor([[[5.0, 6.0, 7.0], [50.0, 60.0, 70.0]]]),  # (1, 2 neurons, 3 outputs)
        "down_proj_bias": torch.tensor([[0.1, 0.2, 0.3]]),
    }
    segments = segments_from_parameters(parameters, ExpertLayout(True, True, True, True))
    assert segments.gate.tolist() == [[[1.0, 10.0], [3.0, 30.0]]]
    assert segments.up.tolist() == [[[2.0, 20.0], [4.0, 40.0]]]
    assert segments.down.tolist() == [[[5.0, 6.0, 7.0], [50.0, 60.0, 70.0]]]
    assert torch.equal(segments.output_bias, parameters["down_proj_bias"])


def test_default_layout_by_hand():
    """All gates come first, and a down projection (o, f) is read by columns."""
    parameters = {
        "gate_up_proj": torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]]),
        "down_proj": torch.tensor([[[9.0, 10.0], [11.0, 12.0], [13.0, 14.0]]]),
    }
    segments = segments_from_parameters(parameters, ExpertLayout())
    assert segments.gate.tolist() == [[[1.0, 2.0], [3.0, 4.0]]]
    assert segments.up.tolist() == [[[5.0, 6.0], [7.0, 8.0]]]
    assert segments.down.tolist() == [[[9.0, 11.0, 13.0], [10.0, 12.0, 14.0]]]
    assert segments.output_bias is None and segments.biased is False


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fewer_experts_are_written(layout):
    """Selected experts are written in the order given."""
    segments = segments_for(layout)
    full = parameters_from_segments(segments, layout)
    one = parameters_from_segments(segments.select(torch.tensor([1])), layout)
    for name, value in one.items():
        assert torch.equal(value, full[name][1:])


@pytest.mark.parametrize("kind", KINDS)
def test_select_takes_experts_in_the_order_given(kind):
    """Selection reorders every part, copies, and keeps the bias flag."""
    segments = make_segments(kind)
    before = copies(segments)
    chosen = segments.select(torch.tensor([4, 0]))
    assert chosen.biased is segments.biased
    for part, whole in zip(chosen[:4], segments[:4], strict=True):
        assert (part is None and whole is None) or torch.equal(part, torch.stack([whole[4], whole[0]]))
    chosen.up.zero_()
    assert_unchanged(before, segments)


@pytest.mark.parametrize("kind", KINDS)
def test_to_converts_every_part(kind):
    """`to` changes the dtype of all tensors and nothing else."""
    segments = make_segments(kind)
    converted = segments.to(torch.float32)
    assert converted.biased is segments.biased
    for part, whole in zip(converted[:4], segments[:4], strict=True):
        assert (part is None and whole is None) or torch.equal(part, whole.float())


@pytest.mark.parametrize("kind", KINDS)
def test_concatenated_rows_are_gate_up_down(kind):
    """Row j of the matrix lists the neuron's gate, up and down values; `split` undoes it."""
    segments = make_segments(kind)
    matrix = segments.concatenated(2)
    for j, row in enumerate(matrix.tolist()):
        assert row == [v for part in segments[:3] if part is not None for v in part[2, j].tolist()]
    for part, whole in zip(segments.split(matrix), segments.parts, strict=True):
        assert torch.equal(part, whole[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(0, 1, 1), (1, 1, 1), (0.5, 2.0, 0.25), (0, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dot_products_are_weighted_mean_cosines(kind, weights, dtype):
    """Similarity vectors multiply to the reference's weighted mean of cosines."""
    segments = make_segments(kind, experts=2, width=3, dtype=dtype)
    before = copies(segments)
    vectors = similarity_vectors(segments, weights).flatten(0, 1)
    flat = [[None] * 6 if part is None else part.double().flatten(0, 1).tolist() for part in segments[:3]]
    rows = list(zip(*flat, strict=True))
    expected = [[reference_similarity(a, b, weights) for b in rows] for a in rows]
    assert vectors.dtype == dtype
    assert_near(vectors @ vectors.T, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    assert_unchanged(before, segments)


def test_similarity_ignores_lengths_and_zero_weights():
    """Scaling a projection changes no similarity; a projection of weight zero takes no room."""
    segments = make_segments()
    scaled = segments._replace(up=segments.up * 4.0, gate=segments.gate + 1.0)
    assert torch.equal(similarity_vectors(scaled, (0, 1, 1)), similarity_vectors(segments, (0, 1, 1)))
    assert similarity_vectors(segments, (0, 1, 1)).shape[-1] == 4 + 3
    assert similarity_vectors(segments, (1, 0, 0)).shape[-1] == 4


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("weights", [(0, 0, 0), (1, -1, 1), (-1, 1, 1), (0, float("nan"), 1)])
def test_impossible_similarity_weights(kind, weights):
    """Negative, undefined or all zero weights are refused."""
    with pytest.raises(ValueError, match="similarity weights"):
        similarity_vectors(make_segments(kind), weights)


def test_gate_weight_alone_needs_a_gate():
    """Without a gate its weight does not count, so it cannot be the only one."""
    with pytest.raises(ValueError, match="not all zero"):
        similarity_vectors(make_segments("plain"), (1, 0, 0))
