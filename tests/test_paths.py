"""File names that are not UTF-8: refused at once, wherever they would end up in a report, and never half way."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import make_model, random_tokens, sample_texts, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_dern import DernCompressor
from optimum_dern.commands.main import main
from optimum_dern.paths import check_utf8


BAD = os.fsdecode(b"caf\xe9")  # Latin 1
FIELDS = {"num_experts": 4, "method": "prune", "preset": "paper", "batch_size": 4}
MATCH = r"caf\\udce9[^ ]*' is not UTF-8 text, so it cannot be written into a report; rename"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model and text under a name that is text and one that is not."""
    root = tmp_path_factory.mktemp("paths")
    make_model("mixtral").save_pretrained(root / "good")
    tiny_tokenizer().save_pretrained(root / "good")
    shutil.copytree(root / "good", root / BAD)
    for name in ("good", BAD):
        (root / "texts" / name).mkdir(parents=True)
        (root / "texts" / name / f"{name}.jsonl").write_text("\n".join(map(json.dumps, sample_texts())), "utf-8")
    return root


def test_names():
    """Strings, paths, and what holds them."""
    check_utf8("caf\u00e9", Path("caf\u00e9"), None, 3, ["a", {"b": 1}], {"a": 1})
    for value in (BAD, Path(BAD), ["a", BAD], {BAD: 1.0}, [[Path(BAD)]], "a\ud800"):
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            check_utf8(value)


@pytest.mark.parametrize("which", ["source", "output", "dataset", "folder", "mix", "evaluate"])
def test_compress(which, files, tmp_path, capsys):
    """Of the command line; nothing is written."""
    source, output = files / (BAD if which == "source" else "good"), tmp_path / (BAD if which == "output" else "out")
    text = files / "texts" / "good" / "good.jsonl"
    bad = files / "texts" / BAD
    data = {"dataset": [bad / f"{BAD}.jsonl"], "folder": [bad], "mix": [text, f"{bad}=2"]}.get(which, [text])
    options = ["--evaluate", bad if which == "evaluate" else text, "--num-experts", "4", "--preset", "paper"]
    with pytest.raises(SystemExit):
        main([str(part) for part in ("compress", source, output, "--dataset", *data, *options)])
    assert "is not UTF-8 text" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_file_in_a_folder(files, tmp_path):
    """A folder whose own name is text."""
    (tmp_path / f"{BAD}.jsonl").write_text('"some text"', "utf-8")
    with pytest.raises(ValueError, match=r"caf\\udce9.jsonl' is not UTF-8 text"):
        DernCompressor(**FIELDS, dataset=tmp_path).compress_model(make_model("mixtral"), tiny_tokenizer())


@pytest.mark.parametrize("which", ["source", "output"])
def test_in_python(which, files, tmp_path):
    """On disk and in memory, before the model is touched."""
    source, output = files / (BAD if which == "source" else "good"), tmp_path / (BAD if which == "output" else "out")
    compressor = DernCompressor(**FIELDS, dataset=random_tokens())
    with pytest.raises(ValueError, match=MATCH):
        compressor.compress_checkpoint(source, output)
    model = AutoModelForCausalLM.from_pretrained(files / "good")
    model.config.name_or_path = str(source)  # safetensors does not load from there; pickled weights are loaded
    with pytest.raises(ValueError, match=MATCH):
        compressor.compress_model(model)
        assert which == "output"
        compressor.save(model, output)
    assert model.config.num_local_experts == (8 if which == "source" else 4)
    assert list(tmp_path.iterdir()) == []


def test_other_commands(files, capsys):
    """`inspect`, `evaluate` and `report`."""
    text = files / "texts" / "good"
    for job in (["inspect"], ["evaluate", "--data", str(text)], ["report"]):
        with pytest.raises(SystemExit):
            main([job[0], str(files / BAD), *job[1:]])
        assert "is not UTF-8 text" in capsys.readouterr().err
