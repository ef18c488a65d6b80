"""Datasets on the Hub and in folders that the library `datasets` reads, and names that are neither."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tiny import tiny_tokenizer

from optimum_dern.data.batches import check_source, holds_text, load_samples
from optimum_dern.data.sources import MADE, Repository, find_repository
from optimum_dern.evaluation.loss.perplexity import OF_A_STREAM, load_texts


TOKENIZER = tiny_tokenizer()


def texts_of(dataset, count=100):
    """The texts of all samples, sorted: a stream is shuffled."""
    return sorted(TOKENIZER.decode(sample.ids) for sample in load_samples(dataset, TOKENIZER, count, 64, 0))


def rows_of(*texts):
    """A dataset of texts."""
    return Dataset.from_dict({"text": list(texts)})


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("org/name", Repository("org/name", None, "train")),
        ("org/name:en", Repository("org/name", "en", "train")),
        ("org/name:20231101.en:validation", Repository("org/name", "20231101.en", "validation")),
        ("org/name:test", Repository("org/name", None, "test")),
        ("org/name::train_sft", Repository("org/name", None, "train_sft")),
        ("name", None),
        ("a/b/c", None),
        ("./name", None),
        ("/name", None),
        ("~/name", None),
        ("data/notes.txt", None),
        ("data/notes.jsonl.gz", None),
        ("data/NOTES.TXT", None),
        ("data/table.csv", None),
    ],
)
def test_names(name, repository):
    """A Hub id has one slash and is no file; what cannot be one is missed at once."""
    assert find_repository(name) == repository
    if repository is not None:
        assert check_source(name)
        return
    with pytest.raises(
        FileNotFoundError, match="neither a file, a folder nor one of .* Hub dataset of the form owner"
    ):
        check_source(name)


@pytest.mark.parametrize("name", ["self", "random", "general", "c4"])
def test_names_of_other_kinds(name):
    """They are known before anything is loaded; what is made needs no tokenizer."""
    check_source(name)
    assert holds_text(name) == (name not in MADE) == holds_text({name: 1})


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one endless dataset; returns the requests, and how many rows were read."""
    requests, read = [], []

    def rows():
        while True:
            read.append(1)
            yield {"text": "hello"}

    def load_dataset(*args, **options):
        requests.append((args, options))
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests, read


def test_a_hub_dataset(hub):
    """Its rows are streamed, and it goes by its whole name."""
    requests, read = hub
    samples = load_samples("org/name:en", TOKENIZER, 5, 64, 0)
    assert requests == [(("org/name", "en"), {"split": "train", "streaming": True})]
    assert [sample.source for sample in samples] == ["org/name:en"] * 5 and len(read) < 1100


def test_evaluation_on_a_hub_dataset(hub, caplog):
    """Some hundred sequences of it, unless a limit is given; the whole of it would never end."""
    texts = load_texts("org/name:validation", TOKENIZER, 64, batch_size=64)
    assert sum(len(batch["input_ids"]) for batch in texts["org/name:validation"]) == OF_A_STREAM
    assert "512 sequences of the stream are taken" in caplog.text
    assert len(load_texts({"org/name": 1}, TOKENIZER, 64, limit=3)["text"][0]["input_ids"]) == 3


def test_what_the_hub_does_not_give(monkeypatch):
    """Without a network, and without such a dataset or configuration; both readings of the name are told."""
    with pytest.raises(ConnectionError, match="'org/name' is neither a file nor a folder here, and the Hub .* reach"):
        texts_of("org/name")

    def refuse(error):
        def load_dataset(*args, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    refuse(datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist"))
    with pytest.raises(FileNotFoundError, match="the Hub does not give it: Dataset 'org/name' doesn't exist"):
        texts_of("org/name")
    refuse(ValueError("Config name is missing."))
    with pytest.raises(ValueError, match="name is missing.. Name a configuration and a split as org/name:config:spl"):
        texts_of("org/name")


def test_saved_datasets(tmp_path):
    """A dataset, and the training split of several, or the one that is named."""
    rows_of("one", "two").save_to_disk(tmp_path / "one")
    assert texts_of(tmp_path / "one") == ["one", "two"]
    DatasetDict(train=rows_of("a"), extra=rows_of("b")).save_to_disk(tmp_path / "several")
    assert texts_of(str(tmp_path / "several")) == ["a"]
    assert texts_of(f"{tmp_path}/several::extra") == ["b"]
    assert texts_of({f"{tmp_path}/several": 1, f"{tmp_path}/one": 1}) == ["a", "one", "two"]
    DatasetDict(held_out=rows_of("a"), extra=rows_of("b")).save_to_disk(tmp_path / "others")
    with pytest.raises(
        ValueError, match="has the splits 'held_out', 'extra' but no 'train'; name one as .*::held_out"
    ):
        texts_of(tmp_path / "others")
    assert list(load_texts(tmp_path / "several", TOKENIZER, 64)) == ["several"]


def write_clone(folder, inner="data"):
    """A folder like a clone of a Hub dataset."""
    (folder / inner).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows_of(f"{split} one", f"{split} two").to_parquet(folder / inner / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n", "utf-8")


@pytest.mark.parametrize("inner", ["data", ""])
def test_a_clone_of_a_hub_dataset(tmp_path, inner):
    """Its training split alone, unless another is named; evaluation reads it as one text."""
    write_clone(tmp_path / "clone", inner)
    assert texts_of(tmp_path / "clone") == ["train one", "train two"]
    assert texts_of(f"{tmp_path}/clone:test") == ["test one", "test two"]
    assert list(load_texts(tmp_path / "clone", TOKENIZER, 64)) == ["clone"]
    with pytest.raises(ValueError, match="Bad split: other.*Name a configuration and a split as"):
        texts_of(f"{tmp_path}/clone::other")


def test_a_clone_by_its_card(tmp_path):
    """The card says which files are the training split."""
    (tmp_path / "good.jsonl").write_text(json.dumps({"text": "good"}), "utf-8")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "bad"}), "utf-8")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: good.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card, "utf-8")
    assert texts_of(tmp_path) == ["good"]


@pytest.mark.parametrize("readme", ["# Notes\n", "---\ntitle: x\n---\n", None])
def test_a_folder_of_plain_files(tmp_path, readme):
    """It is none, and all of its files are read, whatever their names."""
    names = ("train", "test") if readme != "---\ntitle: x\n---\n" else ("a", "b")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}), "utf-8")
    if readme:
        (tmp_path / "README.md").write_text(readme, "utf-8")
    assert find_repository(tmp_path) is None and texts_of(tmp_path) == sorted(names)
