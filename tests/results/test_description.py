"""What reports say about calibration data."""

import json

import pytest
from tiny import random_tokens, sample_texts

from optimum_dern.data.batches import load_batches, load_samples, pad_batches
from optimum_dern.results.description import describe_calibration, describe_dataset, fingerprint, recordable_dataset


ROWS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]


@pytest.mark.parametrize(
    ("dataset", "description"),
    [
        ("c4", "c4"),
        ({"a.txt": 2, "c4": 0.5}, "2 x a.txt + 0.5 x c4"),
        (sample_texts(), "12 strs in memory (list)"),
        (random_tokens(3), "3 dicts in memory (list)"),
        ([], "0 rows in memory (list)"),
        (iter([]), "unknown number rows in memory (list_iterator)"),
    ],
)
def test_describe_dataset(dataset, description):
    """One line: the name or path, or the kind and size of an object."""
    assert describe_dataset(dataset) == description


@pytest.mark.parametrize("dataset", ["c4", "notes.txt", {"a.txt": 2, "c4": 0.5}])
def test_names_are_recorded_as_they_are(dataset):
    """A run on files or named sets can be repeated from its record."""
    assert json.loads(json.dumps(recordable_dataset(dataset))) == dataset


def test_objects_are_recorded_as_descriptions():
    """Texts stay private."""
    assert recordable_dataset(sample_texts()) == describe_dataset(sample_texts())


def test_describe_calibration():
    """Sequences and real tokens are counted, padding is not."""
    batches = load_batches(ROWS, None, batch_size=3)
    described = describe_calibration(ROWS, batches)
    assert described == {
        "dataset": "4 lists in memory (list)",
        "sha256": fingerprint(batches),
        "sequences": 4,
        "tokens": 10,
    }
    assert len(described["sha256"]) == 64


def test_fingerprint():
    """The same tokens have the same digest, however they are batched; another token, mask or order has another."""
    samples = load_samples(ROWS, None, 4, 2048, 0)
    digest = fingerprint(pad_batches(samples, None))
    assert {fingerprint(pad_batches(samples, None, size)) for size in (1, 2, 3, 4)} == {digest}
    assert fingerprint(load_batches(ROWS, None, batch_size=2)) == digest
    others = [pad_batches(samples[::-1], None)]
    for name in ("input_ids", "attention_mask"):
        others.append(pad_batches(samples, None))
        others[-1][0][name][0, -1] = 0
    assert len({digest, *map(fingerprint, others)}) == 4
