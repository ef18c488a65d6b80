"""Rows: streams are read no further than needed, empty rows are counted, token rows come from any device."""

import itertools

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import tiny_tokenizer

from optimum_dern.data.batches import load_batches, load_samples
from optimum_dern.data.rows import SHUFFLE_BUFFER


TOKENIZER = tiny_tokenizer()


def texts_of(dataset, count, seed=0):
    """The texts of the samples."""
    return [TOKENIZER.decode(sample.ids) for sample in load_samples(dataset, TOKENIZER, count, 64, seed)]


@pytest.mark.parametrize("kind", ["stream", "generator"])
def test_an_endless_stream(kind):
    """As many rows as a shuffled draw needs; the seed alone decides which."""
    read = []

    def rows():
        for i in itertools.count():
            read.append(i)
            yield {"text": str(i) if i % 10 else None}

    def dataset():
        return IterableDataset.from_generator(rows) if kind == "stream" else rows()

    first = texts_of(dataset(), 4)
    assert len(set(first)) == 4 and max(map(int, first)) > 50
    assert len(read) < 1.2 * (SHUFFLE_BUFFER + 4)  # a tenth is empty
    torch.manual_seed(5)
    assert texts_of(dataset(), 4) == first != texts_of(dataset(), 4, seed=1)


def test_a_short_stream():
    """All of it, if it has no more."""
    stream = Dataset.from_dict({"text": ["a", "b", "c"]}).to_iterable_dataset()
    assert sorted(texts_of(stream, 9)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "empty",
    [
        None,
        "",
        " \n",
        [],
        {"text": None},
        {"text": ""},
        {"input_ids": []},
        {"input_ids": None},
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"prompt": "", "completion": ""},
        {"prompt": "a", "completion": None},
        {"instruction": None, "output": None},
        torch.zeros(0, dtype=torch.int64),
    ],
    ids=repr,
)
def test_empty_rows(empty, caplog):
    """They are left out before the draw, so that as many as wanted are drawn, and one warning counts them."""
    rows = [empty, "one", empty, {"text": "two"}]
    assert texts_of(rows, 2) == ["one", "two"]
    (record,) = caplog.records
    assert (
        record.getMessage()
        == f"4 {type(empty).__name__}s in memory (list): 2 of 4 rows read are null or empty and left out"
    )


def test_no_empty_rows(caplog):
    """No word about them."""
    texts_of(["one", "two"], 2)
    assert not caplog.records


@pytest.mark.parametrize("row", [{"text": ["a", "b"]}, ["a", "b"], {"text": {"a": 1}}, {"text": b"a"}, 3.5])
def test_no_row(row):
    """What it is, in the error."""
    with pytest.raises(ValueError, match="a calibration row is a .*; give text, token ids or a dict of them"):
        texts_of([row], 2)


class Elsewhere(torch.Tensor):
    """A tensor of another device: of no use until it is copied."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def flatten(self):
        raise TypeError("on another device")


@pytest.mark.parametrize("form", ["ids", "dict", "batch"])
def test_rows_on_a_device(form):
    """They are copied to the CPU."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]]).as_subclass(Elsewhere)
    mask = torch.ones(2, 3).as_subclass(Elsewhere)
    rows = {
        "ids": list(ids),
        "dict": [{"input_ids": ids[0], "attention_mask": mask[0]}, {"input_ids": ids[1]}],
        "batch": [{"input_ids": ids, "attention_mask": mask}],
    }[form]
    (batch,) = load_batches(rows, None, batch_size=2)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]] and type(batch["attention_mask"]) is torch.Tensor
