"""Calibration data in every form, to the same padded batches."""

import json
import random
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import EOS, PAD, make_model, padded_batch, random_tokens, sample_texts, tiny_tokenizer

from optimum_dern import DernCompressor
from optimum_dern.data.batches import load_batches, load_samples
from optimum_dern.evaluation.loss.perplexity import evaluate_loss


TOKENIZER = tiny_tokenizer()
TEXTS = sample_texts()


def ids_of(text):
    """Token ids of one text."""
    return TOKENIZER(text)["input_ids"]


def samples_of(dataset, num_samples=128, sequence_length=2048, seed=0, column="text", tokenizer=TOKENIZER):
    """The ids of all samples, after a check that nothing is masked."""
    samples = load_samples(dataset, tokenizer, num_samples, sequence_length, seed, column)
    assert all(ids.dtype == mask.dtype == torch.int64 and mask.all() for ids, mask, _ in samples)
    return [ids.tolist() for ids, _, _ in samples]


EXPECTED = [ids_of(text) for text in TEXTS]


@pytest.mark.parametrize(
    "dataset",
    [
        TEXTS,
        tuple(TEXTS),
        [{"text": text, "id": i} for i, text in enumerate(TEXTS)],
        [{"input_ids": ids} for ids in EXPECTED],
        [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in EXPECTED],
        [torch.tensor(ids) for ids in EXPECTED],
        EXPECTED,
        [TOKENIZER(text) for text in TEXTS],
        [TOKENIZER(text, return_tensors="pt") for text in TEXTS],
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"input_ids": EXPECTED}),
        iter(TEXTS),
        ["", *TEXTS, " \n"],
        TOKENIZER(TEXTS, return_tensors="pt", padding=True),
        [TOKENIZER(TEXTS[:7], return_tensors="np", padding=True), TOKENIZER(TEXTS[7:])],
        [EXPECTED],
    ],
    ids=(
        "list tuple rows dicts tensors-2d tensors ids encodings encodings-pt dataset token-dataset iterator blanks "
        "batch batches id-batch"
    ).split(),
)
def test_objects(dataset):
    """All forms of data in memory give the same samples."""
    assert samples_of(dataset) == EXPECTED


def test_jsonl(tmp_path):
    """One JSON value a line; blank lines are skipped, and any column can hold the text."""
    lines = [json.dumps({"text": "x", "code": text}) for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines) + "\n", "utf-8")
    assert samples_of(tmp_path / "rows.jsonl", column="code") == EXPECTED


@pytest.mark.parametrize("rows", [TEXTS, [{"text": text} for text in TEXTS], EXPECTED])
def test_json(tmp_path, rows):
    """A JSON list of texts, of rows, or of token ids."""
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    assert samples_of(str(tmp_path / "rows.json")) == EXPECTED


def test_parquet(tmp_path):
    """A column of a parquet file."""
    Dataset.from_dict({"text": TEXTS, "n": list(range(12))}).to_parquet(tmp_path / "rows.parquet")
    assert samples_of(tmp_path / "rows.parquet") == EXPECTED


@pytest.mark.parametrize("form", ["tensor", "tensors", "dicts"])
def test_pt(tmp_path, form):
    """A tensor with a row a sequence, a list of tensors, or a list of token dicts."""
    rows = random_tokens(5, 8)
    forms = {
        "tensor": torch.stack([row["input_ids"] for row in rows]),
        "tensors": [row["input_ids"] for row in rows],
        "dicts": rows,
    }
    torch.save(forms[form], tmp_path / "rows.pt")
    assert samples_of(tmp_path / "rows.pt", tokenizer=None) == [row["input_ids"].tolist() for row in rows]


def test_txt_is_one_stream(tmp_path):
    """Documents follow one another with EOS between them, cut into whole windows; none loses its tail to a cut."""
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(TEXTS), "utf-8")
    stream = [token for ids in EXPECTED for token in [*ids, EOS]]
    windows = samples_of(tmp_path / "text.txt", sequence_length=50)
    assert windows == [stream[i : i + 50] for i in range(0, len(stream) - 49, 50)]
    assert samples_of(tmp_path / "text.txt", sequence_length=10**4) == [stream]  # shorter than one window


def test_folder(tmp_path):
    """All files of a folder in equal shares, in the order of their names; other files are left out."""
    (tmp_path / "b.json").write_text(json.dumps(TEXTS[:6]), "utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(text) for text in TEXTS[6:]), "utf-8")
    (tmp_path / "README.md").write_text("not data", "utf-8")
    assert samples_of(tmp_path) == EXPECTED[6:] + EXPECTED[:6]
    few = samples_of(tmp_path, num_samples=4)
    assert [ids in EXPECTED[6:] for ids in few] == [True, True, False, False]


@pytest.mark.parametrize(
    ("weights", "count", "shares"),
    [((1, 1), 6, (3, 3)), ((3, 1), 8, (6, 2)), ((2, 1), 5, (3, 2)), ((1, 0), 4, (4, 0)), ((0.2, 0.1), 3, (2, 1))],
)
def test_mix(tmp_path, weights, count, shares):
    """`num_samples` is shared in proportion to the weights, remainders to the largest fraction."""
    sources = {"short": [[1]] * 20, "long": [[2, 2]] * 20}
    for name, rows in sources.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), "utf-8")
    mix = {str(tmp_path / f"{name}.json"): weight for name, weight in zip(sources, weights, strict=True)}
    samples = samples_of(mix, num_samples=count)
    assert (samples.count([1]), samples.count([2, 2])) == shares


@pytest.mark.parametrize(
    ("sizes", "weights", "count", "shares"),
    [
        ((2, 20, 20), (1, 1, 1), 12, (2, 5, 5)),
        ((2, 3, 20), (1, 1, 1), 15, (2, 3, 10)),
        ((1, 20, 20), (2, 2, 1), 10, (1, 6, 3)),
        ((2, 3, 4), (1, 1, 1), 15, (2, 3, 4)),
        ((2, 20, 20), (1, 1, 0), 8, (2, 6, 0)),
        ((0, 20, 20), (1, 1, 1), 9, (0, 5, 4)),
    ],
)
def test_a_source_that_is_too_short(tmp_path, sizes, weights, count, shares):
    """The others give what it lacks, in proportion; all of everything where that is not enough."""
    names = [str(tmp_path / f"{i}.json") for i in range(3)]
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        Path(name).write_text(json.dumps([[i]] * size), "utf-8")
    samples = samples_of(dict(zip(names, weights, strict=True)), num_samples=count)
    assert tuple(samples.count([i]) for i in range(3)) == shares
    assert samples == sorted(samples)


def test_draw():
    """`num_samples` distinct rows in their own order, chosen by the seed alone."""
    rows = [[i] for i in range(50)]
    first = samples_of(rows, num_samples=10, seed=1)
    torch.manual_seed(123)
    assert samples_of(rows, num_samples=10, seed=1) == first != samples_of(rows, num_samples=10, seed=2)
    assert first == sorted(first) and len({ids[0] for ids in first}) == 10
    assert samples_of(rows, num_samples=50, seed=3) == rows == samples_of(rows, num_samples=99, seed=3)


@pytest.mark.parametrize("dataset", [TEXTS, EXPECTED, [TOKENIZER(text) for text in TEXTS]])
def test_cut(dataset):
    """Sequences are cut at `sequence_length`; shorter ones stay as they are."""
    assert samples_of(dataset, sequence_length=80) == [ids[:80] for ids in EXPECTED]
    assert min(map(len, EXPECTED)) < 80 < max(map(len, EXPECTED))


def test_batches():
    """Shorter sequences are padded on the left and masked; the last batch may be smaller."""
    batches = load_batches(TEXTS, TOKENIZER, batch_size=5)
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 2]
    rows = [row for batch in batches for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for (ids, mask), expected in zip(rows, EXPECTED, strict=True):
        assert mask.sum() == len(expected)
        assert ids[mask.bool()].tolist() == ids[-len(expected) :].tolist() == expected
        assert (ids[~mask.bool()] == PAD).all()
    assert batches[0]["input_ids"].dtype == batches[0]["attention_mask"].dtype == torch.int64
    assert (batches[0]["attention_mask"] == 0).any()


def test_masks_are_kept():
    """A mask in the data says which of its tokens count."""
    row = {"input_ids": [5, 6, 7, 8], "attention_mask": [0, 1, 1, 0]}
    (batch,) = load_batches([row, [9, 9]], None, batch_size=2, sequence_length=3)
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [0, 1, 1]]


IDS = [1, 2, 3, 4, 5]
MASKS = {
    "packed": ([1, 1, 2, 2, 3], "holds 2, but it must hold 1 .* packed samples apart, give each sample as a row"),
    "additive": ([0.0, 0.0, -1e9, 0.0, 0.0], "holds -1000000000.0, but"),
    "share": ([0.5, 1, 1, 1, 1], "holds 0.5, but"),
    "nan": ([float("nan"), 1, 1, 1, 1], "holds nan, but"),
    "4-D": (torch.ones(1, 1, 5, 5), r"of shape \(1, 1, 5, 5\) stands beside 5 tokens; give one number a token"),
    "short": ([1, 1, 1], r"of shape \(3,\) stands beside 5 tokens"),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_something_else(kind, rows):
    """Numbers other than 0 and 1, and other shapes, are refused: they would be summed up as tokens."""
    mask, match = MASKS[kind]
    row = {"input_ids": IDS, "attention_mask": mask}
    if rows == 2:
        row = {"input_ids": torch.tensor([IDS, IDS]), "attention_mask": torch.stack([torch.as_tensor(mask)] * 2)}
    with pytest.raises(ValueError, match=match):
        load_batches([row], None, sequence_length=4)


@pytest.mark.parametrize("mask", [[True] * 5, [1.0] * 5, torch.ones(1, 5, dtype=torch.uint8)])
def test_masks_of_other_dtypes(mask):
    """Ones are ones."""
    (batch,) = load_batches([{"input_ids": IDS, "attention_mask": mask}], None)
    assert batch["attention_mask"].tolist() == [[1] * 5] and batch["attention_mask"].dtype == torch.int64


def test_masks_of_batches_made_elsewhere():
    """`compress_model` and the evaluation look at those that they are given, too."""
    model, mask = make_model("mixtral"), torch.tensor([MASKS["packed"][0]])
    batch = {"input_ids": torch.tensor([IDS]), "attention_mask": mask}
    for job in (DernCompressor(num_experts=4, dataset=[IDS]).compress_model, evaluate_loss):
        with pytest.raises(ValueError, match="holds 2, but it must"):
            job(model, batches=[batch])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_come_apart(side):
    """Rows of a batch are sequences of their own, each cut by itself; padding goes, gaps in a mask stay."""
    batch = padded_batch([9, 4, 7], side)
    batch["attention_mask"][2, 4] = 0  # real tokens on both sides
    samples = load_samples([batch], None, 128, 6, 0)
    assert [len(ids) for ids, _, _ in samples] == [6, 4, 6]
    assert samples[0][0].equal(batch["input_ids"][0, :6])
    assert samples[1][0].equal(batch["input_ids"][1][batch["attention_mask"][1].bool()])
    assert [int(mask.sum()) for _, mask, _ in samples] == [6, 4, 5]
    assert len(load_samples([batch], None, 2, 6, 0)) == 2
    whole = load_samples([{"input_ids": batch["input_ids"]}], None, 128, 9, 0)
    assert torch.stack([ids for ids, _, _ in whole]).equal(batch["input_ids"])


def test_padding_without_a_padding_token():
    """EOS pads where there is no padding token."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    (batch,) = load_batches(["ab", "a"], tokenizer, batch_size=2)
    assert batch["input_ids"][1].tolist() == [EOS, *ids_of("a")]


@pytest.mark.parametrize(
    ("dataset", "error", "match"),
    [
        ([], ValueError, "holds no token"),
        (["", " "], ValueError, "holds no token"),
        ("nowhere.txt", FileNotFoundError, "neither a file, a folder nor one of.*wikitext2"),
        (42, ValueError, "type int is not supported"),
        (b"bytes", ValueError, "type bytes is not supported"),
        ([3, 4], ValueError, "row is a int"),
        ([None], ValueError, "holds no token"),
        ([[]], ValueError, "holds no token"),
        ([{"body": "x"}], ValueError, r"no column 'text', only \['body'\]; name it with text_column"),
        ({}, ValueError, "needs sources"),
        ({"a.txt": 0}, ValueError, "not all zero"),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), ValueError, r"DatasetDict of 'train'.*\['train'\]"),
        ({"text": TEXTS}, ValueError, r"dataset\['text'\]"),
        ({"a.txt": -1, "b.txt": 2}, ValueError, ">= 0"),
        ({"a.txt": float("nan"), "b.txt": 2}, ValueError, "finite weights"),
        ({"a.txt": float("inf"), "b.txt": 2}, ValueError, "finite weights"),
    ],
)
def test_unusable_data(dataset, error, match):
    """One exception that tells what was found and what is allowed."""
    with pytest.raises(error, match=match):
        load_batches(dataset, TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("rows.csv", "a,b", "cannot read calibration data from 'rows.csv'"),
        ("empty.txt", " \n", "holds no token"),
        ("broken.json", '["a",\n', "broken.json, line 2 is not JSON .Expecting value"),
        ("broken.jsonl", '"a"\n\n{"text": ', "broken.jsonl, line 3 is not JSON .Expecting value"),
    ],
)
def test_unusable_files(tmp_path, name, content, match):
    """Files of another type, without text, or that cannot be parsed."""
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=match):
        load_batches(tmp_path / name, TOKENIZER)


def test_empty_folder(tmp_path):
    """A folder without data is named, and what it has instead."""
    with pytest.raises(ValueError, match=f"the folder {tmp_path} has no data file .*holds nothing"):
        load_batches(tmp_path, TOKENIZER)
    (tmp_path / "notes.md").write_text("", "utf-8")
    (tmp_path / "more").mkdir()
    with pytest.raises(ValueError, match="it holds more/, notes.md"):
        load_batches(tmp_path, TOKENIZER)


@pytest.mark.parametrize("name", ["latin.txt", "latin.json", "latin.jsonl"])
def test_text_in_another_encoding(tmp_path, name):
    """The line that cannot be decoded is named."""
    (tmp_path / name).write_bytes("one\ntwo\ndr\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}, line 3 is not UTF-8 text"):
        load_batches(tmp_path / name, TOKENIZER)


@pytest.mark.parametrize("dataset", [["some text"], "c4", "text.txt"])
def test_text_without_a_tokenizer(tmp_path, monkeypatch, dataset):
    """Text is refused before anything is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text", "utf-8")
    with pytest.raises(ValueError, match="give a tokenizer"):
        load_batches(dataset, None)


@pytest.mark.parametrize("value", [{"text": TEXTS}, {"input_ids": EXPECTED}])
def test_a_dict_of_columns_is_not_its_keys(tmp_path, value):
    """A JSON object of columns is refused, and never calibrates on the columns' names."""
    (tmp_path / "columns.json").write_text(json.dumps(value), "utf-8")
    with pytest.raises(ValueError, match="columns.json holds a dict; give a list of rows"):
        samples_of(tmp_path / "columns.json")


def test_a_stream_of_tokens_is_not_sequences_of_one(tmp_path):
    """A one-dimensional tensor of ids is refused."""
    torch.save(torch.arange(100), tmp_path / "stream.pt")
    with pytest.raises(ValueError, match="stream.pt holds a Tensor; give .* a 2-D tensor"):
        samples_of(tmp_path / "stream.pt", sequence_length=10)


@pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new"])
def test_named_datasets(monkeypatch, name):
    """Optimum's own loader is asked, once, and the global random states that it seeds are put back."""
    calls = []

    def get_dataset(dataset_name, tokenizer, nsamples, seqlen, seed):
        calls.append((dataset_name, tokenizer, nsamples, seqlen, seed))
        for seeding in (random.seed, numpy.random.seed, torch.random.manual_seed):
            seeding(seed)
        ids = torch.randint(256, (nsamples, 1, seqlen))
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    monkeypatch.setattr("optimum.gptq.data.get_dataset", get_dataset)
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    batches = load_batches(name, TOKENIZER, num_samples=6, sequence_length=7, batch_size=3, seed=11)
    assert calls == [(name, TOKENIZER, 6, 7, 11)]
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 7)] * 2
    assert random.getstate() == states[0]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
