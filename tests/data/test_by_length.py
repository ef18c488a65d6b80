"""Micro-batches by tokens: sequences of like lengths together, and work for every process."""

import pytest
import torch

from optimum_dern.data.batches import Sample, by_length, largest_batch, load_batches, pad_batches
from optimum_dern.machine.processes import Processes


def samples_of(lengths):
    """One sample a length, filled with its index."""
    rows = [torch.full((length,), index) for index, length in enumerate(lengths)]
    return [Sample(ids, torch.ones_like(ids), f"source {index}") for index, ids in enumerate(rows)]


def random_lengths(count, longest=300, seed=0):
    """Any lengths from 1 up."""
    return torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_longest_first_and_those_of_one_length_in_their_order():
    """As many as fit, padding included; one that is too long is alone."""
    assert by_length([4, 9, 4, 30, 9, 4, 4], batch_tokens=18) == [[3], [1, 4], [0, 2, 5, 6]]
    assert by_length([4, 4, 4, 4], batch_tokens=18) == [[0, 1, 2, 3]]
    assert by_length([4, 4, 4, 4], batch_tokens=11) == [[0, 1], [2, 3]]
    assert by_length([0, 5], batch_tokens=5) == [[1], [0]]
    assert by_length([]) == []


def test_one_length_a_batch():
    """Where padding is to be avoided, and always for long ones, a batch ends where the length changes."""
    lengths = [4, 9, 4, 30, 9, 4, 4]
    assert by_length(lengths, batch_tokens=18, mixed=False) == [[3], [1, 4], [0, 2, 5, 6]]
    assert by_length(lengths, batch_tokens=100, mixed=False) == [[3], [1, 4], [0, 2, 5, 6]]
    assert by_length(lengths, batch_tokens=100) == [[3, 1, 4], [0, 2, 5, 6]]
    assert by_length([1025, 900, 1025, 1024, 7]) == [[0, 2], [3, 1, 4]]  # masks of long ones would take much memory


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [8, 41, 200])
def test_every_process_has_work(count, processes):
    """Each sequence is in one batch within the bound, and the processes' tokens differ by a sequence at most."""
    lengths = random_lengths(count)
    batches = by_length(lengths, 2000, processes)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert max(padded) <= 2000
    tokens = [sum(lengths[index] for index in batch) for batch in batches]
    loads = [sum(Processes(rank, processes).share(tokens)) for rank in range(processes)]
    assert max(loads) - min(loads) <= max(lengths)
    assert sum(padded) <= 1.5 * sum(lengths) + 2000


def test_equal_lengths_are_shared_evenly():
    """A hundred sequences that fill seven batches are eight for four processes, with 25 sequences for each."""
    batches = by_length([512] * 100, 8192, 4)
    assert [len(batch) for batch in batches] == [16] * 4 + [9] * 4
    assert len(by_length([512] * 100, 8192)) == 7
    assert [len(batch) for batch in by_length([512] * 3, 8192, 3)] == [1, 1, 1]


def test_fewer_sequences_than_processes():
    """Nothing can be shared then, and the refusal says what helps."""
    with pytest.raises(ValueError, match="4 processes cannot share 3 calibration batches; start at most 3 processes"):
        Processes(0, 4).share(by_length([5] * 3, processes=4))


def test_padded_batches():
    """Equal lengths need no padding; the others are padded on the left; labels go with the rows."""
    lengths = [5, 3, 5, 2, 5]
    batches = pad_batches(samples_of(lengths), None, batch_tokens=15)
    assert [batch["position"] for batch in batches] == [[0, 2, 4], [1, 3]]
    assert [batch["source"] for batch in batches] == [["source 0", "source 2", "source 4"], ["source 1", "source 3"]]
    assert batches[0]["attention_mask"].all()
    assert batches[1]["input_ids"].tolist() == [[1, 1, 1], [0, 3, 3]]
    assert batches[1]["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert [batch["position"] for batch in pad_batches(samples_of(lengths), None, 2)] == [[0, 1], [2, 3], [4]]


def test_loaded_batches():
    """By default by tokens, too, and without labels; a number of sequences is obeyed."""
    rows = [[1] * length for length in random_lengths(64)]
    batches = load_batches(rows, None)
    assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in batches)
    assert len(batches) == 2 and max(batch["input_ids"].numel() for batch in batches) <= 8192
    assert len(load_batches(rows, None, batch_tokens=300)) > 30
    assert len(load_batches(rows, None, batch_size=16)) == 4


def test_large_tensors_bound_a_batch():
    """Some 8,000 tokens, or 2 ** 27 numbers of the largest tensor, but a token at least."""
    assert largest_batch(0) == largest_batch(2048) == 8192
    assert largest_batch(32 * 2048) == 2048
    assert largest_batch(128_000) == 1048
    assert largest_batch(1 << 40) == 1
