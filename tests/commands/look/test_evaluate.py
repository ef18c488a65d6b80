"""`optimum-dern evaluate`: what it measures, what it keeps, what it refuses."""

import json

import pytest
from task_rows import ROWS, write_tasks
from tiny import make_model, sample_texts, tiny_tokenizer

from optimum_dern.commands.main import main
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, load_texts
from optimum_dern.evaluation.tasks.accuracy import evaluate_tasks
from optimum_dern.evaluation.tasks.load import load_tasks


def save(model, folder):
    """A checkpoint with its tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    """What is evaluated."""
    return make_model("mixtral", max_position_embeddings=256)


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """Two checkpoints, two texts and some tasks."""
    root = tmp_path_factory.mktemp("files")
    save(model, root / "model")
    save(make_model("mixtral", seed=1, max_position_embeddings=256), root / "original")
    (root / "texts").mkdir()
    for name in ("news", "code"):
        (root / "texts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, sample_texts())), "utf-8")
    (root / "tasks").mkdir()
    (root / "empty").mkdir()
    write_tasks(root / "tasks", "riddles", "lambada_openai", "mmlu")
    return root


def figures_of(capsys, *arguments):
    """What a run prints with --json."""
    main(["evaluate", *map(str, arguments), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("streamed", [(), ("--streamed",)])
def test_texts_and_tasks(capsys, files, model, streamed):
    """The same figures as in Python, whole or a layer at a time."""
    options = [
        "--data",
        files / "texts",
        "--sequence-length",
        32,
        "--tasks",
        "riddles",
        "mmlu:cloze",
        "lambada_openai",
    ]
    figures = figures_of(capsys, files / "model", *options, "--tasks-folder", files / "tasks", *streamed)
    losses = evaluate_texts(model, load_texts(files / "texts", tiny_tokenizer(), 32))
    assert {name: text["tokens"] for name, text in figures["texts"].items()} == {
        n: t.tokens for n, t in losses.items()
    }
    for name, text in figures["texts"].items():
        assert text["loss"] == pytest.approx(losses[name].loss, rel=1e-5)
        assert text["perplexity"] == pytest.approx(losses[name].perplexity, rel=1e-4)
        assert text["standard_error"] == pytest.approx(losses[name].standard_error, rel=1e-3)
    tasks = load_tasks(["riddles", "mmlu:cloze", "lambada_openai"], files / "tasks")
    results = evaluate_tasks(model, tiny_tokenizer(), tasks)
    assert list(figures["tasks"]) == [task.name for task in tasks]
    for name, task in figures["tasks"].items():
        for metric, estimate in task["metrics"].items():
            assert estimate["value"] == pytest.approx(results[name].metrics[metric].value, rel=1e-3)
    assert figures["agreement"] == {}


def test_limit(capsys, files):
    """So many sequences of a text, so many items of a task."""
    options = ["--data", files / "texts", "--tasks", files / "tasks" / "riddles.jsonl", "--sequence-length", 16]
    figures = figures_of(capsys, files / "model", *options, "--limit", 2)
    assert {text["tokens"] for text in figures["texts"].values()} == {2 * 15}
    assert figures["tasks"]["riddles"]["items"] == 2


def test_one_sequence_and_one_item(capsys, files):
    """Of a single one there is no standard error: null in JSON, a dash in the tables."""
    options = [files / "model", "--data", files / "texts" / "news.jsonl", "--tasks", files / "tasks" / "riddles.jsonl"]
    options += ["--limit", 1, "--against", files / "original"]
    figures = figures_of(capsys, *options)
    assert figures["texts"]["news"]["standard_error"] is None
    assert figures["tasks"]["riddles"]["metrics"]["acc"]["standard_error"] is None
    assert figures["agreement"]["news"]["kl"]["standard_error"] is None
    main(["evaluate", *map(str, options)])
    shown = capsys.readouterr().out
    assert f"{figures['texts']['news']['loss']:.4f} ± – " in shown and "± 0.0000" not in shown


def test_against_the_original(capsys, tmp_path, files):
    """Agreement by text; kept predictions serve again without the original, where they are what is asked for."""
    original = save(make_model("mixtral", seed=1, max_position_embeddings=256), tmp_path / "original")
    options = [files / "model", "--data", files / "texts" / "news.jsonl", "--against", original]
    options += ["--cache", tmp_path / "cache", "--top-k", 300]
    first = figures_of(capsys, *options, "--sequence-length", 32)["agreement"]["news"]
    assert first["kl"]["value"] == first["kl_at_least"] > 0.1
    assert first["top1"]["value"] < 0.5
    (original / "model.safetensors").unlink()
    assert figures_of(capsys, *options, "--sequence-length", 32)["agreement"]["news"] == first
    for other in (["--sequence-length", "16"], ["--sequence-length", "32", "--dtype", "bfloat16"]):
        with pytest.raises(SystemExit):
            main(["evaluate", *map(str, options), *other])
        assert "model.safetensors" in capsys.readouterr().err
    assert (tmp_path / "cache" / "cache.json").is_file()
    itself = figures_of(capsys, files / "original", "--data", files / "texts", "--against", files / "original")
    assert {text["top1"]["value"] for text in itself["agreement"].values()} == {1}


def test_tables_and_output(capsys, tmp_path, files):
    """Without --json, tables with errors; --output has every figure."""
    options = ["--data", files / "texts", "--tasks", "riddles", "--tasks-folder", files / "tasks"]
    options += ["--against", files / "original", "--output", tmp_path / "figures.json"]
    main(["evaluate", str(files / "model"), *map(str, options)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    loss, accuracy = figures["texts"]["news"], figures["tasks"]["riddles"]["metrics"]["acc"]
    kl = figures["agreement"]["news"]["kl"]
    shown = [line[1:4] for line in lines if line[:1] in (["news"], ["riddles"])]
    assert shown == [
        [f"{part[key]:.4f}", "±", f"{part['standard_error']:.4f}"]
        for part, key in ((loss, "loss"), (accuracy, "value"), (kl, "value"))
    ]
    assert figures["settings"]["sequence_length"] == 256  # the model's own limit


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "there is nothing to measure"),
        (("--data", "/nowhere/text.txt"), "neither a file, a folder nor"),
        (("--tasks", "riddles"), "there is no task file 'riddles'"),
        (("--tasks", "riddle", "--tasks-folder", "TASKS"), "it has lambada_openai, mmlu, riddles"),
        (("--tasks", "TASKS/riddles.jsonl", "--against", "MODEL"), "give --data, too"),
        (("--data", "TEXTS", "--cache", "cache"), "--against, which is not given"),
        (("--data", "TEXTS", "--against", "/nowhere/model"), "no checkpoint folder '/nowhere/model'"),
        (("--data", "TEXTS", "--against", "MODEL", "--cache", "TEXTS"), "is not an empty folder"),
        (("--data", "TEXTS", "--limit", "0"), "--limit is 0"),
        (("--data", "TEXTS", "--sequence-length", "1"), "length for evaluation is 1; give at least 2 tokens"),
        (("--data", "TEXTS", "--device", "mps"), "the device 'mps' has no float64"),
        (("--data", "TEXTS", "--device", "gpu"), "'gpu' is not a device of torch"),
        (("--data", "TEXTS", "--against", "nope"), "there is no local folder 'nope'"),
        (("--data", "TEXTS", "--against", "TASKS"), "has no config.json"),
        (("--data", "TASKS/../empty"), "empty has no data file"),
        (("--data", "TEXTS", "--top-k", "-1"), "--top-k is -1"),
        (("--data", "TEXTS", "--output", "/nowhere/figures.json"), "no folder /nowhere"),
        (("--data", "TEXTS", "TEXTS/news.jsonl"), "two texts of --data are named 'news'"),
        (
            ("--tasks", "all", "--tasks-folder", "TASKS", "--lm-eval", "--streamed"),
            "leave --lm-eval or --streamed out",
        ),
    ],
)
def test_errors(capsys, files, arguments, match):
    """One line, exit code 2, before any weight is loaded."""
    places = {"TASKS": str(files / "tasks"), "TEXTS": str(files / "texts"), "MODEL": str(files / "model")}
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", str(files / "model"), *arguments])
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("optimum-dern: error: ") and match in line
    assert output.out == ""


def test_both_spellings():
    """`optimum-cli dern evaluate` is the same command."""
    from optimum_dern.commands.look import evaluate
    from optimum_dern.commands.optimum_cli import DernCommand

    assert evaluate.HELP in [command.help for command in DernCommand.SUBCOMMANDS if command.name == "evaluate"]


def test_dtype(capsys, files):
    """--dtype is what the model computes in."""
    options = [files / "model", "--data", files / "texts" / "news.jsonl", "--sequence-length", 32]
    coarse, fine = (figures_of(capsys, *options, "--dtype", dtype) for dtype in ("bfloat16", "float32"))
    assert coarse["texts"]["news"]["loss"] != fine["texts"]["news"]["loss"]
    assert coarse["texts"]["news"]["loss"] == pytest.approx(fine["texts"]["news"]["loss"], rel=0.05)


@pytest.mark.slow
def test_rows_are_scored_by_lm_eval(capsys, files):
    """--lm-eval gives the same accuracies, where it is installed."""
    pytest.importorskip("lm_eval")
    options = [files / "model", "--tasks", files / "tasks" / "riddles.jsonl"]
    ours, theirs = (figures_of(capsys, *options, *extra)["tasks"]["riddles"] for extra in ((), ("--lm-eval",)))
    for metric, estimate in theirs["metrics"].items():
        assert estimate == ours["metrics"][metric]
    assert len(ROWS["riddles"]) == theirs["items"]
