"""The command line, in its own process where that matters and in this one where it does not."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, sample_texts, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import CompressionReport, DernCompressor, DernConfig
from optimum_dern.checkpoint.output.manifest import only_process
from optimum_dern.commands import compress
from optimum_dern.commands.look import inspect
from optimum_dern.commands.main import main


ROOT = str(Path(__file__).parents[2])


def run_process(*arguments, program=(sys.executable, "-m", "optimum_dern"), run=subprocess.run):
    """Run the program; the finished process comes back."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return run([*program, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd="/", timeout=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "qwen3"
    make_model("qwen3_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n<|endoftext|>\n".join(sample_texts() * 2), "utf-8")
    return path


def error_of(capsys, *arguments):
    """The message of a run that must fail with exit code 2, one line on stderr and nothing on stdout."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("optimum-dern: error: ")
    return line.removeprefix("optimum-dern: error: ")


@pytest.mark.slow
def test_compress_end_to_end(tmp_path, checkpoint, text):
    """One command: one JSON line on stdout, a checkpoint that loads, and the same result as the Python API."""
    output = tmp_path / "out"
    options = ("--num-experts", 4, "--sequence-length", 48, "--batch-size", 4, "--self-share", 0, "--json")
    done = run_process("compress", checkpoint, output, "--dataset", text, "--evaluate", text, *options, run=forked.run)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["output"] == str(output)
    assert (result["before"]["experts"], result["after"]["experts"]) == (8, 4)
    assert result["ratio"] == result["after"]["bytes"] / result["before"]["bytes"] < 1
    losses = result["evaluation"]["notes"]
    assert losses["before"]["tokens"] == losses["after"]["tokens"] > 0
    assert losses["before"]["loss"] != losses["after"]["loss"]

    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_local_experts == 4
    assert AutoTokenizer.from_pretrained(output)("text")["input_ids"] == tiny_tokenizer()("text")["input_ids"]
    report = CompressionReport.load(output / "dern_report.json")
    assert report.source == checkpoint.name
    assert report.evaluation == result["evaluation"]
    same = DernCompressor(num_experts=4, dataset=text, sequence_length=48, batch_size=4)
    again = same.compress_model(AutoModelForCausalLM.from_pretrained(checkpoint), str(checkpoint))
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    assert same.report.calibration == report.calibration


@pytest.mark.slow
def test_an_error_in_a_process():
    """Exit code 2 and one line on stderr, without a traceback."""
    done = run_process("compress", "/nowhere/model", "/nowhere/out", "--dataset", "notes.txt")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("optimum-dern: error: there is no checkpoint folder '/nowhere/model'")


def test_compress_prints_a_table(tmp_path, capsys, checkpoint, text):
    """Without --json, the sizes and losses before and after, and what won."""
    main(["compress", str(checkpoint), str(tmp_path / "out"), "--dataset", str(text), "--sequence-length", "48"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    before, after = (sum(p.numel() for p in m.parameters()) for m in (make_model("qwen3_moe"), load(tmp_path / "out")))
    assert ["experts", "per", "layer", "8", "4"] in lines
    assert ["parameters", f"{before:,}", f"{after:,}", "x", f"{after / before:.2f}"] in lines
    assert lines[-1][0] == "layers:" and str(tmp_path / "out") in " ".join(lines[-1])


@pytest.mark.parametrize(
    ("family", "overrides", "options"),
    [
        ("qwen3_moe", {}, ("--num-experts", "6")),
        ("qwen3_moe", {}, ("--num-experts", "4", "--width-sparsity", "0.5")),
        ("deepseek_v3", {"n_routed_experts": 14}, ("--num-experts", "6")),  # in two groups
        ("deepseek_v3", {}, ("--num-experts", "4")),  # the fewest that a router with two groups can work with
    ],
)
def test_advice_on_serving(tmp_path, capsys, text, family, overrides, options):
    """What is said before a compression is what is said after it."""
    make_model(family, **overrides).save_pretrained(source := tmp_path / "source")
    tiny_tokenizer().save_pretrained(source)
    given = [*options, "--method", "prune", "--preset", "fast", "--dataset", str(text), "--sequence-length", "48"]
    said = []
    for words in (["inspect", str(source)], ["compress", str(source), str(tmp_path / "out")]):
        main([*words, *given])
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("for serving: ")])
    assert said[0] == said[1] and len(said[0]) == (options != ("--num-experts", "4"))


def load(folder):
    """A model from a folder."""
    return AutoModelForCausalLM.from_pretrained(folder)


def test_several_amounts(tmp_path, capsys, checkpoint, text):
    """One command, several checkpoints, each with its losses; statistics of a oneshot run make more without text."""
    output, recorded = tmp_path / "out", tmp_path / "out" / "dern_statistics.safetensors"
    options = ["--preset", "paper", "--sequence-length", "48", "--batch-size", "4"]
    data = ["--dataset", str(text), "--evaluate", str(text), "--json"]
    main(["compress", str(checkpoint), str(output), "--num-experts", "6", "4", *options, *data])
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["output"] for result in results] == [str(output / "6-experts"), str(output / "4-experts")]
    assert [result["after"]["experts"] for result in results] == [6, 4]
    losses = [result["evaluation"]["notes"] for result in results]
    assert losses[0]["before"] == losses[1]["before"] and losses[0]["after"]["loss"] != losses[1]["after"]["loss"]
    for folder, loss in zip(("6-experts", "4-experts"), losses, strict=True):
        assert CompressionReport.load(output / folder / "dern_report.json").evaluation["notes"] == loss
    more = ["--sparsity", "0.25", "0.5", "--statistics", str(recorded)]
    main(["compress", str(checkpoint), str(tmp_path / "more"), *more, *options])
    shown = capsys.readouterr().out
    assert shown.count("\nfor serving: ") == shown.count("\nfor serving: 6 experts") == 1
    assert shown.count("experts per layer") == 2 and f"saved to {tmp_path / 'more' / '4-experts'}" in shown
    for folder in ("6-experts", "4-experts"):
        tensors = [load_file(path / folder / "model.safetensors") for path in (output, tmp_path / "more")]
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_no_text(tmp_path, capsys, checkpoint):
    """A criterion of weights alone needs no --dataset."""
    options = ["--method", "prune", "--preset", "paper", "--selection", "aimer", "--json"]
    main(["compress", str(checkpoint), str(tmp_path / "out"), *options])
    assert json.loads(capsys.readouterr().out)["after"]["experts"] == 4


def test_inspect(capsys, checkpoint):
    """Structure and sizes before and after, which are those that compression gives."""
    main(["inspect", str(checkpoint), "--num-experts", "4", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    facts = json.loads(line)
    model = make_model("qwen3_moe")
    compressor = DernCompressor(num_experts=4, dataset=sample_texts())
    compressor.compress_model(model, tiny_tokenizer())
    before, after = compressor.report.before, compressor.report.after
    assert facts["model_type"] == "qwen3_moe"
    assert facts["moe_layers"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert facts["experts"] == [8, 4]
    assert (facts["experts_per_token"], facts["router_groups"]) == (2, 1)
    for name in ("parameters", "active_parameters", "bytes"):
        assert facts[name] == [getattr(before, name), getattr(after, name)]
    assert facts["calibration_tokens"] == 128 * 128  # sequences, and as many tokens as the model reads
    layer = sum(p.numel() * p.element_size() for p in make_model("qwen3_moe").model.layers[0].parameters())
    streams, width, size = 2, 32, 4  # through compressed layers and the original's, for the drift; float32
    assert facts["layer_bytes"] == layer
    assert facts["hidden_bytes"] == streams * facts["calibration_tokens"] * width * size

    main(["inspect", str(checkpoint), "--sparsity", "0.25"])
    table = capsys.readouterr().out
    assert "2 of 8 experts per token" in table
    assert ["experts", "per", "layer", "8", "6"] in [row.split() for row in table.splitlines()]
    assert table.count("\nfor serving: 6 experts are neither a power of two nor a multiple of 8") == 1


@pytest.mark.parametrize(
    ("arguments", "reads"),
    [
        (("--method", "prune", "--selection", "aimer", "--preset", "paper"), False),
        (("--method", "prune", "--selection", "aimer", "--preset", "paper", "--dataset", "c4"), True),
        (("--method", "prune", "--selection", "router", "--preset", "paper"), True),
        (("--method", "prune", "--selection", "aimer"), True),
    ],
)
def test_inspect_counts_the_tokens_that_are_read(capsys, checkpoint, arguments, reads):
    """None where weights alone decide and no text is given: the same work whatever the length of the sequences."""
    found = []
    for length in ("16", "64"):
        main(["inspect", str(checkpoint), *arguments, "--sequence-length", length, "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert [facts["calibration_tokens"] for facts in found] == ([128 * 16, 128 * 64] if reads else [0, 0])
    assert (found[0]["hidden_bytes"] < found[1]["hidden_bytes"]) is reads
    memory, *parts = ([facts[f"{part}_bytes"] for facts in found] for part in ("memory", "working", "hidden"))
    assert memory[1] - memory[0] == sum(long - short for short, long in parts)
    assert (memory[1] > memory[0]) is reads
    main(["inspect", str(checkpoint), *arguments])
    assert ("with no calibration tokens" in capsys.readouterr().out) is not reads


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--method", "foo"), "unknown method 'foo'"),
        (("--selection", "foo"), "unknown selection criterion 'foo'"),
        (("--protect-experts", '{"9": [0]}'), "protect_experts names layer 9; MoE layers are [0, 1]"),
        (("--num-experts", "9"), "num_experts=9, but each layer has 8 experts; choose num_experts=2 to 7"),
    ],
)
def test_inspect_refuses_what_compress_refuses(capsys, checkpoint, arguments, match):
    """With the same words."""
    assert match in error_of(capsys, "inspect", checkpoint, *arguments)


@pytest.mark.parametrize("amount", [(), ("--num-experts", "1")])
def test_two_experts_of_which_a_token_uses_two(tmp_path, capsys, text, amount):
    """Nothing can be dropped, and both commands say so."""
    make_model("mixtral", num_local_experts=2).save_pretrained(tmp_path / "two")
    capsys.readouterr()  # of its progress bar
    jobs = [("inspect", tmp_path / "two"), ("compress", tmp_path / "two", tmp_path / "out", "--dataset", text)]
    for job in jobs:
        error = error_of(capsys, *job, *amount)
        assert "none of the 2 experts of a layer can be dropped, whatever is asked for" in error and "top_k=2" in error
    assert "nothing to compress" in error_of(capsys, *jobs[1], "--num-experts", "2")
    assert not (tmp_path / "out").exists()


def test_inspect_reads_no_weights(tmp_path, capsys, checkpoint):
    """The config alone is enough."""
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    main(["inspect", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["experts"] == [8, 4]


def test_config_file_and_override(tmp_path, capsys, checkpoint, text):
    """`--config` gives any fields, and options win; an amount on the command line replaces the file's."""
    file = tmp_path / "config.json"
    config = DernConfig(sparsity=0.25, dataset=str(text), sequence_length=32, refit=False, num_samples=7)
    file.write_text(json.dumps(DernCompressor(config).to_dict()), "utf-8")
    options = ["--config", str(file), "--num-experts", "5", "--num-samples", "6", "--json"]
    main(["compress", str(checkpoint), str(tmp_path / "out"), *options])
    assert json.loads(capsys.readouterr().out)["after"]["experts"] == 5
    report = CompressionReport.load(tmp_path / "out" / "dern_report.json")
    expected = {**config.to_dict(), "dataset": text.name, "sparsity": None, "num_experts": 5, "num_samples": 6}
    assert report.config == expected
    assert report.calibration["sequences"] == 6


def test_the_config_of_an_earlier_output(tmp_path, capsys, checkpoint):
    """`--config` takes a dern_config.json as it lies beside a checkpoint."""
    options = ["--preset", "paper", "--selection", "aimer", "--method", "prune", "--num-experts", "5", "--json"]
    main(["compress", str(checkpoint), str(tmp_path / "first"), *options])
    again = ["--config", str(tmp_path / "first" / "dern_config.json"), "--json"]
    main(["compress", str(checkpoint), str(tmp_path / "second"), *again])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["after"]["experts"] == 5
    reports = [CompressionReport.load(tmp_path / name / "dern_report.json") for name in ("first", "second")]
    assert reports[0].config == reports[1].config


def test_overwrite(tmp_path, capsys, checkpoint, text):
    """A folder that is not empty is left alone unless --overwrite is given."""
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    options = [str(checkpoint), str(tmp_path), "--dataset", str(text), "--sequence-length", "32"]
    assert "is not empty; choose another folder or add --overwrite" in error_of(capsys, "compress", *options)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    main(["compress", *options, "--overwrite"])
    assert load(tmp_path).config.num_local_experts == 4
    assert (tmp_path / "mine.txt").read_text("utf-8") == "mine"


def test_the_source_is_never_overwritten(capsys, checkpoint, text):
    """MODEL and OUTPUT cannot be the same folder, not even with --overwrite."""
    options = ("--overwrite", "--dataset", text)
    for output in (checkpoint, checkpoint / ".." / checkpoint.name):
        assert "same folder" in error_of(capsys, "compress", checkpoint, output, *options)
    assert load(checkpoint).config.num_local_experts == 8


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--dataset", "x.txt", "--num-experts", "4", "3", "--sparsity", "0.5"), "give one of them"),
        (("--dataset", "x.txt", "--num-experts", "4", "--sparsity", "0.5"), "give one of them"),
        (("--dataset", "x.txt", "--num-experts", "0"), "num_experts=0"),
        (("--dataset", "x.txt", "--config", "/nowhere/config.json"), "/nowhere/config.json"),
        (("--config", "LIST"), "holds a list"),
        (("--config", "BROKEN"), "BROKEN, line 1 is not JSON (Expecting"),
        (("--config", "UNKNOWN"), "UNKNOWN has num_expert; the fields of a config are sparsity, num_experts"),
        pytest.param(("--dataset", "/nowhere/notes.txt"), "neither a file"),
        pytest.param(("--dataset", "c4", "--method", "distil"), "unknown method"),
        (("--dataset", "c4", "--evaluation-length", "64"), "of the text of --evaluate: give --evaluate TEXT, too"),
        (("--dataset", "c4", "--device", "mps"), "the device 'mps' has no float64"),
        (("--dataset", "c4", "--device", "gpu"), "'gpu' is not a device of torch"),
        (("--dataset", "c4", "--device", "cuda:99"), "there is no device 'cuda:99' here"),
        (("--dataset", "c4", "--no-refit", "--neuron-refit"), "neuron_refit=True has no effect without refit=True"),
        (("--dataset", "c4", "--protect-experts", "supper"), "like {3: [0, 5]}, be 'super', or be the path of"),
        (("--config", "GUARD"), "guard=1, but it must be True or False"),
        pytest.param(("--dataset", "c4", "--selection", "astrology"), "unknown selection"),
    ],
)
def test_errors_before_anything_is_loaded(tmp_path, monkeypatch, capsys, checkpoint, arguments, match):
    """Wrong options cost no loading and write nothing."""
    files = {"LIST": "[1]", "BROKEN": "{", "UNKNOWN": '{"num_expert": 4}', "GUARD": '{"guard": 1}'}
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    arguments = [str(tmp_path / argument) if argument in files else argument for argument in arguments]
    assert match in error_of(capsys, "compress", checkpoint, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--dataset", "TEXT", "--num-experts", "1"), "would leave 1 of 8 experts"),
        (("--dataset", "TEXT", "--num-experts", "4", "1"), "would leave 1 of 8 experts"),
        (("--statistics", "/nowhere/file"), "recorded statistics are not enough"),
        (("--preset", "paper", "--statistics", "/nowhere/file"), "there is no statistics file"),
        (("--dataset", "TEXT", "--method", "distil"), "unknown method 'distil'"),
        (("--dataset", "/nowhere/notes.txt"), "neither a file, a folder nor one of"),
        (("--dataset", "TEXT", "--evaluate", "/nowhere/held_out.txt"), "neither a file, a folder nor one of"),
        (("--dataset", "TEXT", "--evaluate", "TEXT", "--evaluation-length", "1"), "length for evaluation is 1; give"),
    ],
)
def test_errors_after_loading(tmp_path, monkeypatch, capsys, checkpoint, text, arguments, match):
    """The message is the last line; nothing is written."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        arguments = [text if argument == "TEXT" else argument for argument in arguments]
        assert match in error_of(capsys, "compress", checkpoint, tmp_path / "out", *arguments)
    finally:
        logging.enable_progress_bar()
    assert not (tmp_path / "out").exists()


def test_a_name_that_cannot_be_found(capsys):
    """Neither a folder nor, without a network, a model of the Hub."""
    assert "there is no local folder 'no-such-model'" in error_of(capsys, "inspect", "no-such-model")


def test_dtype(tmp_path, checkpoint, text):
    """`--dtype` decides what is written."""
    options = ["--dataset", str(text), "--sequence-length", "32", "--dtype", "bfloat16", "--json"]
    main(["compress", str(checkpoint), str(tmp_path / "out"), *options])
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


def test_traceback(checkpoint, tmp_path):
    """`--traceback` shows the error as it was raised."""
    with pytest.raises(ValueError, match="num_experts=0"):
        main(["compress", str(checkpoint), str(tmp_path / "out"), "--num-experts", "0", "--traceback"])


@pytest.mark.parametrize("kind", [TypeError, KeyError, ValueError])
def test_an_internal_error(monkeypatch, capsys, checkpoint, kind):
    """A fault of the program is no mistake of the user's: its type, and how to see where it is."""
    accidents = {TypeError: lambda: len(5), KeyError: lambda: {}["name"], ValueError: lambda: int("five")}
    monkeypatch.setattr(inspect, "run", lambda args: accidents[kind]())
    message = error_of(capsys, "inspect", checkpoint)
    assert message.startswith(f"{kind.__name__}: ") and message.endswith(" (--traceback shows where)")
    with pytest.raises(kind):
        main(["inspect", str(checkpoint), "--traceback"])


def test_a_folder_in_use(capsys, tmp_path, checkpoint):
    """A refusal is told without its type, whatever that is."""
    (tmp_path / "out" / ".dern").mkdir(parents=True)
    options = ["--method", "prune", "--preset", "paper", "--selection", "aimer"]
    with only_process(tmp_path / "out" / ".dern"):
        message = error_of(capsys, "compress", checkpoint, tmp_path / "out", *options)
    assert message.startswith("another process is compressing into") and "traceback" not in message


def test_a_damaged_checkpoint(tmp_path, capsys, checkpoint, text):
    """Weights that were cut off are an error of the data, too."""
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    error_of(capsys, "compress", source, tmp_path / "out", "--dataset", text)


def test_compare_on_mps(capsys, checkpoint):
    """Its losses need float64, too."""
    assert "the device 'mps' has no float64" in error_of(capsys, "compare", checkpoint, checkpoint, "--device", "mps")


@pytest.mark.parametrize("arguments", [("--preset", "best"), ("--num-experts", "four"), ("--no-such-option",)])
def test_usage_errors(tmp_path, capsys, checkpoint, text, arguments):
    """Errors that the parser finds look like all others."""
    error_of(capsys, "compress", checkpoint, tmp_path / "out", "--dataset", text, *arguments)


def test_help(capsys):
    """Every field of `DernConfig` is an option, with its help text and default, and the examples are shown."""
    with pytest.raises(SystemExit) as exit_info:
        main(["compress", "--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    words, letters = " ".join(shown.split()), "".join(shown.split())  # argparse breaks lines at hyphens, too
    fields = [field for field in dataclasses.fields(DernConfig) if field.name != "quant_method"]
    assert len(fields) > 20
    for field in fields:
        flag = f"--{field.name.replace('_', '-')}"
        assert f" {flag} " in words or f" {flag}," in words
        assert "".join(field.metadata["help"].split()) in letters
    assert "--no-refit" in shown and "(default: 128)" in words
    assert compress.EPILOG.strip() in shown
    assert "--quant-method" not in shown


def test_commands_are_listed(capsys):
    """The top-level help names the commands; a missing command is an error."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "compress" in shown and "inspect" in shown
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2


@pytest.mark.slow
def test_optimum_cli(checkpoint):
    """`optimum-cli dern` is the same program."""
    try:
        importlib.metadata.distribution("optimum-dern")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("optimum-dern is not installed, so optimum-cli cannot find its command")
    program = (Path(sys.executable).with_name("optimum-cli"),)
    done = run_process("dern", "inspect", checkpoint, "--num-experts", 4, "--json", program=program)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["experts"] == [8, 4]
