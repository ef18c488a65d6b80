"""The README's commands beside one another: one model and one text have one loss, whoever measures it."""

import json
import re

import forked
import pytest
from tiny import EOS, make_model, sample_texts, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from optimum_dern import CompressionReport
from optimum_dern.commands.main import main
from optimum_dern.evaluation.compare import model_process


LIMIT, CALIBRATION = 64, 24  # tokens of a sequence: what the model is made for, and what calibration is told


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose tokenizer begins rows, not windows of a stream, with a token of its own."""
    folder = tmp_path_factory.mktemp("source") / "mixtral"
    make_model("mixtral", max_position_embeddings=LIMIT).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A stream of several windows and a rest, one shorter than a window, and rows of different lengths."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "stream.txt").write_text("\n<|endoftext|>\n".join(sample_texts()), "utf-8")
    (folder / "brief.txt").write_text(sample_texts()[0][: LIMIT // 3], "utf-8")
    rows = [text[: 20 + 9 * i] for i, text in enumerate(sample_texts())]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


@pytest.fixture(scope="module")
def calibration(texts):
    """Options of every compression."""
    return [
        "--dataset",
        texts / "stream.txt",
        "--num-samples",
        4,
        "--sequence-length",
        CALIBRATION,
        "--preset",
        "paper",
    ]


def run(*arguments):
    """One command in this process."""
    main([str(argument) for argument in arguments])


def losses_of(figures):
    """Loss, tokens and longest sequence by text."""
    return {name: (f["loss"], f["tokens"], f["sequence_length"]) for name, f in figures.items()}


def reported(folder):
    """The losses before and after in a checkpoint's report, after the card and the page were found to show them."""
    report = CompressionReport.load(folder / "dern_report.json")
    card = (folder / "README.md").read_text("utf-8")
    page = (folder / "dern_report.html").read_text("utf-8")
    shown = json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])["evaluation"]
    assert f"in sequences of up to {report.evaluation_length} tokens" in card
    for name, pair in report.evaluation.items():
        assert re.search(rf"^\| {name} \| {pair['before']['loss']:.4f} .* \| {pair['after']['loss']:.4f} ", card, re.M)
        assert shown[name]["after"]["loss"] == pytest.approx(pair["after"]["loss"], rel=1e-6)
        assert shown[name]["after"]["sequence_length"] == pair["after"]["sequence_length"]
    moments = ({name: pair[moment] for name, pair in report.evaluation.items()} for moment in ("before", "after"))
    return [losses_of(moment) for moment in moments]


def same(first, second):
    """Whether losses are equal but for the last digits of float32, on the same tokens."""
    return first.keys() == second.keys() and all(
        first[name] == (pytest.approx(second[name][0], abs=1e-6), *second[name][1:]) for name in first
    )


def evaluated(output, *arguments):
    """All figures of an `evaluate`."""
    run("evaluate", *arguments, "--output", output)
    return json.loads(output.read_text("utf-8"))


@pytest.mark.slow
def test_every_command_shows_the_same_loss(tmp_path, capsys, monkeypatch, model, texts, calibration):
    """compress, compare and evaluate, whole, streamed and against the original; in files and tables alike."""
    one, several, output = tmp_path / "one", tmp_path / "several", tmp_path / "figures.json"
    run("inspect", model, "--num-experts", 4, *calibration, "--json")
    tokens = json.loads(capsys.readouterr().out)["calibration_tokens"]
    run("compress", model, one, "--num-experts", 4, *calibration, "--evaluate", texts)
    assert f"tokens a sequence {LIMIT} {LIMIT}" in " ".join(capsys.readouterr().out.split())
    run("compress", model, several, "--num-experts", 6, 4, *calibration, "--evaluate", texts)
    before, after = reported(one)
    assert tokens == CompressionReport.load(one / "dern_report.json").calibration["tokens"] == 4 * CALIBRATION
    assert {name: loss[2] for name, loss in before.items()} == {
        "brief": LIMIT // 3 + 1,
        "rows": LIMIT,
        "stream": LIMIT,
    }
    assert before["stream"][1] % (LIMIT - 1) == 0 and before["stream"][1] > 3 * LIMIT  # whole windows
    assert same(reported(several / "6-experts")[0], before) and same(reported(several / "4-experts")[1], after)
    capsys.readouterr()

    monkeypatch.setattr(model_process, "subprocess", forked)
    run("compare", model, several / "4-experts", "--data", texts, "--no-speed", "--device", "cpu", "--output", output)
    first, last = json.loads(output.read_text("utf-8"))["models"]
    assert same(losses_of(first["losses"]), before) and same(losses_of(last["losses"]), after)
    table = " ".join(capsys.readouterr().out.split())
    assert f"tokens a sequence {LIMIT} {LIMIT}" in table and f"loss, stream {before['stream'][0]:.4f} ±" in table

    for how in ([], ["--streamed"]):
        assert same(losses_of(evaluated(output, model, "--data", texts, *how)["texts"]), before)
        capsys.readouterr()
        figures = evaluated(output, one, "--data", texts, "--against", model, *how)
        table = capsys.readouterr().out
        assert figures["settings"]["sequence_length"] == LIMIT
        assert same(losses_of(figures["texts"]), after)
        for name, agreement in figures["agreement"].items():
            loss, increase = (agreement[part]["value"] for part in ("original_loss", "loss_increase"))
            assert loss == pytest.approx(before[name][0], abs=1e-6)
            assert increase == pytest.approx(after[name][0] - before[name][0], abs=1e-6)
            assert f"{loss:.4f} ±" in table
    run("report", one, "--card")
    assert reported(one) == [before, after]


def test_another_length(tmp_path, model, texts, calibration):
    """--evaluation-length and --sequence-length are the same option: calibration's length is another one."""
    length, options = LIMIT // 2, ["--data", texts / "stream.txt"]
    text = ["--evaluate", texts / "stream.txt", "--evaluation-length", length]
    run("compress", model, tmp_path / "out", "--num-experts", 4, *calibration, *text)
    before, after = reported(tmp_path / "out")
    assert before["stream"][2] == length
    for folder, losses in ((model, before), (tmp_path / "out", after)):
        figures = evaluated(tmp_path / "figures.json", folder, *options, "--sequence-length", length)
        assert same(losses_of(figures["texts"]), losses) and figures["settings"]["sequence_length"] == length
