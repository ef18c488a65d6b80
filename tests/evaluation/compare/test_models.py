"""Several models measured side by side, each in a process of its own."""

import json
import shutil

import forked
import pytest
import torch
from safetensors.torch import save_file
from tiny import compress, make_model, sample_texts, tiny_tokenizer

from optimum_dern.checkpoint.source.recorded import STATISTICS_NAME
from optimum_dern.commands.main import main
from optimum_dern.evaluation.compare import model_process as processes
from optimum_dern.evaluation.compare.model_process import ModelProcessError, model_process
from optimum_dern.evaluation.compare.models import Comparison, ModelFigures, compare_models
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, load_texts
from optimum_dern.evaluation.tasks.accuracy import evaluate_tasks
from optimum_dern.evaluation.tasks.load import load_tasks
from optimum_dern.models.loading import load_model
from optimum_dern.reporting.comparison import comparison_rows, markdown_table


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model whose 48 MB of experts are most of the memory it takes, and the same with half of them."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = make_model("mixtral", intermediate_size=8192), tiny_tokenizer()
    model.save_pretrained(folder / "full")
    tokenizer.save_pretrained(folder / "full")
    compress(model, method="prune", preset="paper").save(model, folder / "half", tokenizer=tokenizer)
    save_file({"sums": torch.ones(1000)}, folder / "half" / STATISTICS_NAME)  # lies beside the weights, and is none
    return folder / "full", folder / "half"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(sample_texts()), "utf-8")
    return path


@pytest.fixture(scope="module")
def task(text):
    """Pairs of a sentence and the same with its words turned round."""
    rows = [
        {"id": str(i), "choices": [t, " ".join(reversed(t.split()))], "label": 0} for i, t in enumerate(sample_texts())
    ]
    path = text.with_name("order.jsonl")
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.mark.slow
def test_figures_are_those_of_the_models(checkpoints, text, task, tmp_path, capsys, monkeypatch):
    """Losses equal those measured in this process; sizes, memory and one speed a round are there; so is the table."""
    monkeypatch.setattr(processes, "subprocess", forked)
    names = [str(path) for path in checkpoints]
    options = ["--data", str(text), "--tasks", str(task), "--sequence-length", "32", "--device", "cpu", "--json"]
    speed = ["--batch-size", "2", "--prompt-length", "16", "--new-tokens", "3", "--repeats", "2"]
    main(["compare", *names, *options, *speed, "--output", str(tmp_path / "table.md")])
    full, half = json.loads(capsys.readouterr().out)["models"]
    for path, figures in zip(checkpoints, (full, half), strict=True):
        model = load_model(path, "cpu")
        expected = evaluate_texts(model, load_texts(text, tiny_tokenizer(), 32))["notes"]
        assert figures["path"] == str(path)
        assert figures["losses"]["notes"]["loss"] == pytest.approx(expected.loss, abs=1e-6)
        assert figures["losses"]["notes"]["tokens"] == expected.tokens
        assert figures["losses"]["notes"]["sequence_length"] == 32
        (accuracy,) = evaluate_tasks(model, tiny_tokenizer(), load_tasks([task])).values()
        assert figures["tasks"]["order"]["values"] == accuracy.values()
        assert figures["parameters"] == model.num_parameters()
        assert figures["disk_bytes"] == (path / "model.safetensors").stat().st_size
        assert len(figures["prefill"]) == len(figures["decode"]) == 2
        assert min(figures["prefill"] + figures["decode"]) > 0
        assert figures["prefill_median"] == pytest.approx(sum(figures["prefill"]) / 2)
        assert figures["memory_bytes"] > figures["disk_bytes"]
    assert half["memory_bytes"] < full["memory_bytes"] < 5 * full["disk_bytes"]  # no interpreter, no other model
    assert (full["experts"], half["experts"], half["experts_per_token"]) == (8, 4, 2)
    assert half["parameters"] < full["parameters"] and half["active_parameters"] < full["active_parameters"]
    assert full["agreement"] == {} and 0 < half["agreement"]["notes"]["kl"]["value"]
    increase = half["losses"]["notes"]["loss"] - full["losses"]["notes"]["loss"]
    assert half["agreement"]["notes"]["loss_increase"]["value"] == pytest.approx(increase, abs=1e-5)
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "| experts per layer | 8, 2 a token | 4, 2 a token |" in table
    assert f"| loss, notes | {full['losses']['notes']['loss']:.4f} ±" in table


@pytest.mark.slow
def test_errors_name_the_model(checkpoints, tmp_path):
    """A broken checkpoint is an error with its path, and a process that is gone is noticed."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints[0], broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with model_process(broken, "cpu") as process:
        with pytest.raises(ModelProcessError, match="broken"):
            process.call("size")
        process.process.kill()
        with pytest.raises(ModelProcessError, match="ended with code -9 during size"):
            process.call("size")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-speed"], "nothing to compare"),
        (["--repeats", "0"], "at least 1"),
        (["--output", "table.txt"], "ends in .md or .json"),
        (["--output", "nowhere/table.md"], "no folder nowhere"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--device", "gpu"], "'gpu' is not a device of torch"),
        (["nope"], "there is no local folder 'nope'"),
    ],
)
def test_refused_before_a_model_is_loaded(checkpoints, capsys, monkeypatch, options, message):
    """Wrong arguments cost no time."""
    monkeypatch.setattr("optimum_dern.evaluation.compare.models.compare_models", None)
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", *map(str, checkpoints), *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_sequences_that_predict_nothing(checkpoints, text, monkeypatch):
    """Refused before a process is started."""
    monkeypatch.setattr("optimum_dern.evaluation.compare.models.model_process", None)
    with pytest.raises(ValueError, match="the sequence length for evaluation is 1; give at least 2 tokens"):
        compare_models(checkpoints[0], checkpoints[1:], text, sequence_length=1)


def test_rows_set_every_model_against_the_first():
    """Ratios for sizes and speeds (medians), differences for losses; unmeasured rows are left out."""
    full = ModelFigures("a/full", 8, 2, 1000, 400, 3 * 2**30)
    half = ModelFigures("b/half", 4, 2, 600, 390, 2**30)
    full.memory_bytes, full.prefill, full.decode = 2**20, [10.0, 30.0, 20.0], [4.0]
    half.memory_bytes, half.prefill, half.decode = 2**19, [40.0, 10.0, 30.0], [5.0]
    full.losses, half.losses = (
        {name: {"loss": v, "standard_error": 0.01, "sequence_length": n} for name, n in (("x", 2048), ("z", 9))}
        for v in (2.0, 2.25)
    )
    half.agreement = {"x": {"kl": {"value": 0.125}, "top1": {"value": 0.75}}}
    accuracy = {"main_metric": "acc", "metrics": {"acc": {"value": 0.75, "standard_error": 0.25}}}
    full.tasks = {"y": accuracy | {"values": [1, 1, 0, 1]}}
    half.tasks = {"y": {**accuracy, "metrics": {"acc": {"value": 0.5}}, "values": [1, 1, 0, 0]}}
    header, rows = comparison_rows(Comparison([full, half], None, "cpu", 1))
    assert header == ["", "full", "half"]
    assert rows == [
        ["experts per layer", "8, 2 a token", "4, 2 a token"],
        ["parameters", "1,000", "600 (x 0.60)"],
        ["active per token", "400", "390 (x 0.97)"],
        ["weights on disk", "3.00 GiB", "1.00 GiB (x 0.33)"],
        ["peak memory", "1.0 MiB", "0.5 MiB (x 0.50)"],
        ["prefill, tokens/s", "20", "30 (x 1.50)"],
        ["decode, tokens/s", "4", "5 (x 1.25)"],
        ["text, tokens a sequence", "2,048", "2,048"],
        ["loss, x", "2.0000 ± 0.0100", "2.2500 (+0.2500)"],
        ["loss, z", "2.0000 ± 0.0100", "2.2500 (+0.2500)"],
        ["KL from the original", "", "0.1250"],
        ["same top token", "", "0.7500"],
        ["y, acc", "0.7500 ± 0.2500", "0.5000 (-0.2500 ± 0.2500)"],
    ]
    assert markdown_table(header, rows[:1]).splitlines()[-1] == "| experts per layer | 8, 2 a token | 4, 2 a token |"


def test_a_single_sequence_and_item():
    """Neither has a standard error."""
    metrics = {"acc": {"value": 1.0, "standard_error": None}}
    tasks = {"y": {"main_metric": "acc", "metrics": metrics, "values": [1]}}
    agreement = {"x": {"kl": {"value": 0.5}, "top1": {"value": 1}}}
    losses = {"x": {"loss": 2.0, "standard_error": None, "sequence_length": 9}}
    one = ModelFigures("one", 8, 2, 1, 1, 1, losses, agreement, tasks)
    rows = {name: cells for name, *cells in comparison_rows(Comparison([one, one], None, "cpu", 1))[1]}
    assert rows["loss, x"] == ["2.0000 ± –", "2.0000 (+0.0000)"]
    assert rows["y, acc"] == ["1.0000 ± –", "1.0000 (+0.0000 ± –)"]
