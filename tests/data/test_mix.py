"""Parts of a mix: what they are called, those in memory, and those that are made."""

import json

import pytest
import torch
from datasets import Dataset
from tiny import tiny_tokenizer

from optimum_dern.data.batches import Sample, load_batches, load_samples, pad_batches
from optimum_dern.data.mix import Part, mix_samples
from optimum_dern.results.description import describe_dataset, recordable_dataset


TOKENIZER = tiny_tokenizer()


def sources_of(dataset, count=100, **options):
    """The names of all samples' sources."""
    return [sample.source for sample in load_samples(dataset, TOKENIZER, count, 64, 0, **options)]


@pytest.fixture
def folder(tmp_path):
    """Two files of two rows each, and a text."""
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([[1, 2], [3]]), "utf-8")
    (tmp_path / "c.txt").write_text("text", "utf-8")
    return tmp_path


def test_sources(folder):
    """A folder's files by their names, a mix's sources as they are named there, data in memory as described."""
    assert sources_of(folder) == ["a.json"] * 2 + ["b.json"] * 2 + ["c.txt"]
    file = str(folder / "a.json")
    assert sources_of(file) == [file] * 2
    assert sources_of({file: 1, str(folder): 1}, 4) == [file] * 2 + [str(folder)] * 2
    assert sources_of(["x", "y"]) == ["2 strs in memory (list)"] * 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_with_sources(folder, size):
    """Names go with the rows; evaluation, which passes batches to models as they are, gets none."""
    mix = {str(folder / "a.json"): 1, str(folder / "c.txt"): 1}
    batches = pad_batches(load_samples(mix, TOKENIZER, 128, 2048, 0), TOKENIZER, size)
    rows = [(len(b["input_ids"]), len(b["source"])) for b in batches]
    assert all(sequences == names for sequences, names in rows)
    assert [name for b in batches for name in b["source"]] == [str(folder / "a.json")] * 2 + [str(folder / "c.txt")]
    assert {key for b in load_batches(mix, TOKENIZER, batch_size=size) for key in b} == {"input_ids", "attention_mask"}


def test_data_in_memory_in_a_mix(folder):
    """A dataset object is a source like any other, and described where a report names it."""
    data = Dataset.from_dict({"text": ["x"] * 9})
    mix = {data: 2, str(folder / "a.json"): 1}
    assert sources_of(mix, 3) == ["9 rows in memory (Dataset)"] * 2 + [str(folder / "a.json")]
    assert describe_dataset({data: 2, "c4": 1}) == "2 x 9 rows in memory (Dataset) + 1 x c4"
    assert json.loads(json.dumps(recordable_dataset({data: 2, "c4": 1})))["9 rows in memory (Dataset)"] == 2


def test_parts_need_no_names():
    """Lists, and parts of the same name."""
    parts = [Part("same", ["a"] * 3, 1), Part("same", ["b"] * 9, 2)]
    samples = mix_samples(parts, 9, lambda rows, count: [Sample(row, None, "") for row in rows[:count]])
    assert [(sample.ids, sample.source) for sample in samples] == [("a", "same")] * 3 + [("b", "same")] * 6


def maker(calls, most=100):
    """A function that makes samples of one token, and remembers how many it was asked for."""

    def make(count):
        calls.append(count)
        ids = torch.tensor([7])
        return [Sample(ids, torch.ones_like(ids), "")] * min(count, most)

    return make


def test_made_sources(folder):
    """They are called with their share, alone or in a mix, and not read."""
    calls = []
    made = {"self": maker(calls)}
    assert sources_of("self", 3, made=made) == ["self"] * 3 and calls == [3]
    calls.clear()
    assert sources_of({str(folder / "a.json"): 1, "self": 1}, 4, made=made).count("self") == 2 and calls == [2]
    (batch,) = pad_batches(load_samples({"self": 1}, None, 2, 8, 0, made=made), None, 2)
    assert batch["input_ids"].tolist() == [[7], [7]] and batch["source"] == ["self", "self"]


def test_made_sources_are_made_once(folder):
    """After all that is read, when it is known how much is lacking; if they are short, others fill up."""
    calls = []
    mix = {"self": 1, str(folder / "a.json"): 1}
    found = sources_of(mix, 10, made={"self": maker(calls)})
    assert calls == [8] and found == ["self"] * 8 + [str(folder / "a.json")] * 2
    (folder / "long.json").write_text(json.dumps([[1]] * 20), "utf-8")
    found = sources_of({"self": 1, str(folder / "long.json"): 1}, 10, made={"self": maker(calls, most=2)})
    assert found == ["self"] * 2 + [str(folder / "long.json")] * 8


@pytest.mark.parametrize("name", ["self", "random"])
def test_made_sources_that_nobody_makes(name):
    """Such as for evaluation."""
    with pytest.raises(ValueError, match=f"'{name}' is made for calibration by the model .*; give text to read"):
        load_batches(name, TOKENIZER)
