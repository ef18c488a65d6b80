"""`optimum-dern sample`, and `compress` without a dataset: the model writes its own calibration text."""

import json
import re

import pytest
from tiny import make_checkpoint

from optimum_dern.commands.main import main


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model with its tokenizer."""
    return make_checkpoint(tmp_path / "model")


def rows_of(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_two_words(checkpoint, tmp_path, capsys):
    """`compress MODEL OUTPUT` is enough; what the model wrote lies beside the result."""
    main(["compress", str(checkpoint), str(tmp_path / "out"), "--num-samples", "6", "--no-neuron-refit", "--json"])
    assert json.loads(capsys.readouterr().out)["after"]["experts"] == 4
    rows = rows_of(tmp_path / "out" / "calibration.jsonl")
    assert [len(row["input_ids"]) for row in rows] == [128] * 6  # the model's context
    assert "--dataset self" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_a_file_for_compress(checkpoint, tmp_path, capsys):
    """It holds what compress would let the model write, and compress reads it as token ids."""
    options = ["--num-samples", "6", "--sequence-length", "20"]
    main(["sample", str(checkpoint), str(tmp_path / "text.jsonl"), *options, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"output": str(tmp_path / "text.jsonl"), "sequences": 6, "tokens": 120}
    common = ["--no-neuron-refit", "--self-share", "0", *options]
    main(["compress", str(checkpoint), str(tmp_path / "own"), *common])
    main(["compress", str(checkpoint), str(tmp_path / "read"), "--dataset", str(tmp_path / "text.jsonl"), *common])
    written = [row["input_ids"] for row in rows_of(tmp_path / "own" / "calibration.jsonl")]
    assert [row["input_ids"] for row in rows_of(tmp_path / "text.jsonl")] == written
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "read")]
    assert weights[0] == weights[1]


def test_the_seed(checkpoint, tmp_path):
    """The same seed writes the same; a file that is there is not replaced unasked."""
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--num-samples", "2", "--sequence-length", "10", "--seed", seed]
        main(["sample", str(checkpoint), str(tmp_path / f"{name}.jsonl"), *options])
    texts = [[row["input_ids"] for row in rows_of(tmp_path / f"{name}.jsonl")] for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("output", "options", "match"),
    [
        ("there.jsonl", [], "exists; give another name, or --overwrite"),
        ("text.txt", [], "a name that ends with .jsonl"),
        ("nowhere/text.jsonl", [], "no folder"),
        ("text.jsonl", ["--num-samples", "0"], "--num-samples is 0"),
    ],
)
def test_refusals(checkpoint, tmp_path, capsys, output, options, match):
    """One line, before the model is loaded."""
    (tmp_path / "there.jsonl").write_text("mine", "utf-8")
    with pytest.raises(SystemExit):
        main(["sample", str(checkpoint), str(tmp_path / output), *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(match, line)
    assert (tmp_path / "there.jsonl").read_text("utf-8") == "mine"


@pytest.mark.parametrize(("fits", "sequences"), [(True, 20), (False, 13)])
def test_inspect_counts_what_compress_makes(checkpoint, capsys, monkeypatch, fits, sequences):
    """Ten sequences of a dataset and as many of the model's, or a quarter of random tokens if it does not fit."""
    if not fits:
        monkeypatch.setattr("optimum_dern.engine.run.whole_model.MARGIN", 1e9)
    main(["inspect", str(checkpoint), "--dataset", "c4", "--self-share", "0.5", "--num-samples", "10", "--json"])
    assert json.loads(capsys.readouterr().out)["calibration_tokens"] == sequences * 128
