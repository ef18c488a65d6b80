"""Router rows of the retained experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_router_rows
from samples import PROPERTY, TOLERANCE, assert_near

from optimum_dern.core.router.rows import add_moved_rows, retain


def rows_of(experts=6, width=4, dtype=torch.float64, seed=0):
    """Random router rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, width, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_match_the_reference(dtype):
    """Each retained row gains the share of every dropped row that moved to it; no input is written to."""
    rows, retained = rows_of(dtype=dtype), torch.tensor([1, 4])
    destination = torch.tensor([[0, 0, 1], [-1, -1, -1], [1, 1, 1], [-1, 0, 1]])
    saved = [value.clone() for value in (rows, retained, destination)]
    actual = add_moved_rows(rows, retained, destination)
    assert actual.dtype == dtype
    assert_near(actual, reference_router_rows(rows, retained, destination), TOLERANCE[dtype])
    assert all(torch.equal(old, new) for old, new in zip(saved, (rows, retained, destination), strict=True))


@PROPERTY
@given(st.data())
def test_random_moves_match_the_reference(data):
    """Any destinations, any retained experts, down to one kept and to none dropped."""
    experts, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    retained = sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1)))
    places = st.lists(st.integers(-1, len(retained) - 1), min_size=width, max_size=width)
    dropped = experts - len(retained)
    moves = torch.tensor(data.draw(st.lists(places, min_size=dropped, max_size=dropped)), dtype=torch.int64)
    rows, moves = rows_of(experts), moves.view(dropped, width)
    actual = add_moved_rows(rows, torch.tensor(retained), moves)
    assert_near(actual, reference_router_rows(rows, retained, moves), 1e-12)


def test_rows_by_hand():
    """One of four segments goes to the first expert, two to the second, one nowhere."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [8.0, 16.0]])
    actual = add_moved_rows(rows, torch.tensor([0, 1]), torch.tensor([[1, 0, -1, 1]]))
    assert actual.tolist() == [[3.0, 4.0], [4.0, 9.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_discarded_segments_leave_rows_alone(dtype):
    """If nothing moved, the rows are those of the retained experts bit for bit."""
    rows, retained = rows_of(dtype=dtype), torch.tensor([0, 2, 5])
    actual = add_moved_rows(rows, retained, torch.full((3, 4), -1))
    assert actual.dtype == dtype and torch.equal(actual, rows[retained])


def test_low_precision_is_rounded_once():
    """Shares are summed in float64 and rounded to bfloat16 at the end."""
    rows, retained = rows_of(width=40, dtype=torch.bfloat16), torch.tensor([2, 3])
    destination = torch.tensor([[0, 0, 1], [1, 0, 1], [-1, 1, 0], [0, -1, -1]])
    expected = reference_router_rows(rows, retained, destination).to(torch.bfloat16)
    assert torch.equal(add_moved_rows(rows, retained, destination), expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_retain_takes_entries_along_a_dimension(dim):
    """Entries of the retained experts in order, as a new tensor."""
    tensor, retained = torch.arange(36.0).view(6, 6), torch.tensor([0, 3, 5])
    saved = tensor.clone()
    actual = retain(tensor, retained, dim)
    slices = [tensor.select(dim, i) for i in (0, 3, 5)]
    assert torch.equal(actual, torch.stack(slices, dim=dim))
    actual.zero_()
    assert torch.equal(tensor, saved)


def test_retain_biases():
    """A bias has one entry an expert; any dtype is kept."""
    bias = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    kept = retain(bias, torch.tensor([1, 3]))
    assert kept.tolist() == [2, 4] and kept.dtype == torch.int32
