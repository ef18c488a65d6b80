"""Nothing that is published tells where on a machine a model and its data lay."""

import json
import shutil

import pytest
from hub.card import card_problems
from huggingface_hub import ModelCard
from safetensors import safe_open
from tiny import make_model, sample_texts, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import CompressionReport, DernCompressor
from optimum_dern.commands.main import main
from optimum_dern.reporting.presentation import write_presentation


CARD = "---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.b/c\nbase_model: you/moe\n---\nA card.\n"
OPTIONS = {"num_experts": 4, "preset": "paper", "sequence_length": 48, "batch_size": 4}


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A folder whose name must not get out, with a source whose own config names it, and texts."""
    folder = tmp_path_factory.mktemp("unmistakable-private-folder")
    source = folder / "our-moe"
    make_model("mixtral").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["_name_or_path"] = str(source)
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    (source / "README.md").write_text(CARD, "utf-8")
    for kind in ("code", "news"):
        (folder / kind).mkdir()
        (folder / kind / "train.txt").write_text("\n<|endoftext|>\n".join(sample_texts() * 4), "utf-8")
    return folder


def by_command(private, output):
    data = [f"{private / 'code' / 'train.txt'}=2", f"{private / 'news' / 'train.txt'}=1"]
    options = ["--num-experts", "4", "--preset", "paper", "--sequence-length", "48", "--batch-size", "4"]
    evaluate = ["--evaluate", str(private / "news" / "train.txt")]
    main(["compress", str(private / "our-moe"), str(output), "--dataset", *data, *options, *evaluate])


def in_memory(private, output):
    model = AutoModelForCausalLM.from_pretrained(private / "our-moe")
    tokenizer = AutoTokenizer.from_pretrained(private / "our-moe")
    compressor = DernCompressor(dataset=private / "code" / "train.txt", **OPTIONS)
    compressor.compress_model(model, tokenizer)
    compressor.save(model, output, tokenizer)


def by_the_model(private, output):
    model = AutoModelForCausalLM.from_pretrained(private / "our-moe")
    DernCompressor(dataset=str(private / "news"), **OPTIONS).compress_model(model, str(private / "our-moe"))
    model.save_pretrained(output)


def from_statistics(private, output):
    by_command(private, output / "first")
    statistics = output / "first" / "dern_statistics.safetensors"
    DernCompressor(method="prune", preset="paper").compress_checkpoint(
        private / "our-moe", output / "second", statistics=statistics
    )


@pytest.mark.parametrize("way", [by_command, in_memory, by_the_model, from_statistics])
def test_no_file_names_the_folder(private, tmp_path, way):
    """Every file of the checkpoint is searched; the model and the data are called by their own names."""
    way(private, tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file.name for file in files if str(private).encode() in file.read_bytes()] == []
    assert [file.name for file in files if b"unmistakable-private-folder" in file.read_bytes()] == []
    folder = tmp_path / "second" if way is from_statistics else tmp_path
    report = CompressionReport.load(folder / "dern_report.json")
    assert report.source == "our-moe"
    data = {in_memory: "train.txt", by_the_model: "news"}.get(way, "2 x code/train.txt + 1 x news/train.txt")
    assert report.calibration["dataset"] == data
    assert json.loads((folder / "config.json").read_text("utf-8"))["_name_or_path"] == "our-moe"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "mine", "https://a.b/c")
    assert card.data.base_model == ["you/moe"]
    assert card_problems(card.content) == []
    assert "optimum-dern compress our-moe OUTPUT" in card.text


def test_recorded_statistics_name_no_folder(private, tmp_path):
    """Their metadata has the same names as the report."""
    by_command(private, tmp_path)
    with safe_open(tmp_path / "dern_statistics.safetensors", "pt") as file:
        description = json.loads(file.metadata()["dern_statistics"])
    assert description["source"] == "our-moe"
    assert description["options"]["dataset"] == {"code/train.txt": 2.0, "news/train.txt": 1.0}
    assert description["calibration"] == CompressionReport.load(tmp_path / "dern_report.json").calibration


@pytest.mark.parametrize("way", ["memory", "disk"])
def test_the_source_is_still_refused_as_output(private, tmp_path, way):
    """The folder's path is known to the running process, whatever the report calls it."""
    source = tmp_path / "our-moe"
    shutil.copytree(private / "our-moe", source)
    compressor = DernCompressor(dataset=str(private / "news"), **OPTIONS)
    if way == "memory":
        model = AutoModelForCausalLM.from_pretrained(source)
        compressor.compress_model(model, str(source))
    else:
        compressor.compress_checkpoint(source, tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="the original would be lost"):
        compressor.save(model, source)
    compressor.save(model, tmp_path / "other")


def test_a_report_of_an_earlier_release(private, tmp_path):
    """It recorded whole paths; a page and a card that are made of it name none, and keep the licence."""
    by_the_model(private, tmp_path)
    file = tmp_path / "dern_report.json"
    values = json.loads(file.read_text("utf-8"))
    del values["source_card"]
    data = str(private / "news")
    values["config"]["dataset"] = values["calibration"]["dataset"] = data
    values["source"] = str(private / "our-moe")
    report = CompressionReport.from_dict(values)
    write_presentation(report, tmp_path)
    report.save(file)
    for name in ("README.md", "dern_report.html", "dern_report.json"):
        text = (tmp_path / name).read_text("utf-8")
        assert str(private) not in text and "our-moe" in text
    assert ModelCard.load(tmp_path / "README.md").data.license_name == "mine"
