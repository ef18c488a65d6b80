"""Bad input by table: every field of the config and every option of every command, refused before any long work.

A field or an option that is new needs a row here, or a reason why every value of it is good.
"""

import argparse
import dataclasses
import math
from itertools import chain

import pytest
from tiny import make_checkpoint, sample_texts
from transformers import PreTrainedModel

from optimum_dern import DernConfig
from optimum_dern.checkpoint.format.reader import CheckpointReader
from optimum_dern.commands.main import COMMANDS, main
from optimum_dern.errors import is_deliberate


WRONG = {  # values of another kind, by a field's annotation
    bool: (0, 1, "yes", [True], math.nan),
    int: ("4", 4.0, [4], True, math.nan, math.inf),
    float: ("0.5", [0.5], True, math.nan, -math.inf, 1j),
    str: (3, b"dern", ["dern"], True),
}
UNFIT = {  # values out of range; fields that have a kind but no range are in ANY
    "sparsity": (-0.1, 1.0, 2),
    "num_experts": (0, -4),
    "width": (0, -16),
    "width_sparsity": (0.0, 1.0, -1),
    "width_multiple_of": (0, -1),
    "width_budget": ("layer", ""),
    "condensed_layers": (0, -1, [], [-1], [1, 1], ["x"]),
    "preset": ("best", ""),
    "similarity_weights": (None, 1, "abc", (1, 1), (1, 1, math.nan), (0, 0, 0), (-1, 1, 1), {"gate": 1}),
    "router_update": ("columns",),
    "cluster_init": ("kmeans++",),
    "cluster_iterations": (0, -1),
    "cluster_tolerance": (0.0, -1e-4),
    "drift_correction": (-0.1, 1.1),
    "refit_ridge": (0.0, -1),
    "refit_sweeps": (0, -1),
    "calibration_order": ("parallel",),
    "dataset": ({"a": "b"}, {"train": ["x"]}),
    "self_share": (-0.1, 1.0),
    "random_share": (-0.1, 1.0),
    "num_samples": (0, -1),
    "sequence_length": (0, -1),
    "batch_size": (0, -1),
    "seed": (-1, 2**32),
    "protect_experts": (5, [1], "supper", {"x": [1]}, {0: 1}, {0: ["x"]}, {0: [None]}),
    "experts_multiple_of": (0, -1),
    "quant_method": ("gptq",),
}
OTHER_KINDS = {"similarity_weights", "dataset", "protect_experts", "condensed_layers"}  # none of `WRONG`
ANY = {
    "method": "names are checked where the methods are known",
    "selection": "likewise",
    "importance": "likewise",
    "text_column": "a column may have any name",
    "similarity_threshold": "any cosine, and numbers beyond: all neurons move, or none",
    **dict.fromkeys(
        ("recombine", "importance_weighting", "refit", "router_refit", "neuron_refit", "guard"), "yes or no"
    ),
}


def kind_of(field):
    """The type that a field's annotation names, beside None; None where it is none of `WRONG`."""
    return next((kind for kind in WRONG if field.type in (kind, kind | None)), None)


def field_rows():
    for field in dataclasses.fields(DernConfig):
        for value in (*WRONG.get(kind_of(field), ()), *UNFIT.get(field.name, ())):
            yield pytest.param(field.name, value, id=f"{field.name}={value!r:.20}")


@pytest.mark.parametrize(("name", "value"), field_rows())
def test_fields(name, value):
    """The error names the field, what was found and what is allowed."""
    with pytest.raises((ValueError, TypeError)) as error:
        DernConfig(**{name: value})
    assert is_deliberate(error.value) and name.split("_")[0] in str(error.value)
    assert any(word in str(error.value) for word in ("must be", "must map", "give", "leave"))


def test_every_field_has_a_row():
    fields = {field.name: field for field in dataclasses.fields(DernConfig)}
    assert set(fields) == set(UNFIT) | set(ANY) and not set(UNFIT) & set(ANY)
    assert all(kind_of(fields[name]) for name in fields.keys() - OTHER_KINDS)


BASE = {  # a call of each command that would work, and its subcommands
    "compress": ["compress", "model", "out", "--evaluate", "text.txt"],
    "sample": ["sample", "model", "out.jsonl"],
    "inspect": ["inspect", "model"],
    "report": ["report", "model"],
    "evaluate": ["evaluate", "model", "--data", "text.txt", "--tasks", "task.jsonl"],
    "compare": ["compare", "model", "model", "--data", "text.txt"],
    "attribute": ["attribute", "model", "out", "--data", "a=text.txt", "b=text.txt"],
    "merge": ["merge", "model", "model", "model", "out", "--data", "a=text.txt", "b=text.txt"],
    "patterns build": ["patterns", "build", "model", "out", "--task", "a=text.txt"],
    "patterns list": ["patterns", "list", "model"],
    "patterns match": ["patterns", "match", "model", "--model", "model", "--prompt", "text"],
}
MISSING = "no/such/path/x"
FOR = {
    "N": ("-1", "1.5", "x", "nan", ""),
    "K": ("-1", "0", "1.5", "x", ""),
    "X": ("nan", "inf", "x", ""),
    "P": ("nan", "2", "x"),
}
FOR |= {"SIZE": ("x", "-1GB", "0", "nan", "1e999GB"), ("GATE", "UP", "DOWN"): ("nan", "-1", "x"), "BITS": ("5", "x")}
FOR |= dict.fromkeys(("FILE", "TEXT", "TASK", "DIR", "SOURCE", "ORIGINAL"), (MISSING, ""))
FOR |= {"NAME=DATA": ("text.txt", f"a={MISSING}", "=text.txt", "a=", "")}
BY_NAME = {  # options whose metavar says too little
    "device": ("astrology", "cuda:99", ""),
    "device_map": ("astrology", ""),
    "revision": ("v1", ""),  # of a local folder
    "protect_experts": ('{"0": 1}', "[1]", "{", MISSING, ""),
    "mask_domain": ("astrology", ""),
    "text_column": ("",),
    "prompt": ("",),
    "cache": ("text.txt", ""),
    "model": (MISSING, ""),
    "evaluate": (MISSING, ""),
    "evaluation_length": ("-1", "0", "1", "x"),
    "output": ("no/such/folder/out.json", ""),
    **dict.fromkeys(("method", "selection", "importance"), ("astrology", "")),
}


def parsers():
    """The parser of every command and subcommand."""
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parts = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for inner, child in chain.from_iterable(part.choices.items() for part in parts):
            yield f"{name} {inner}", child
        if not parts:
            yield name, parser


def option_rows():
    for command, parser in parsers():
        for action in parser._actions:
            if not action.option_strings or action.nargs == 0:
                continue
            values = ("astrology",) if action.choices else BY_NAME.get(action.dest) or FOR[action.metavar]
            for value in values:
                yield pytest.param(command, action, value, id=f"{command}{action.option_strings[0]}={value}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    make_checkpoint(folder / "model")
    (folder / "text.txt").write_text("\n".join(sample_texts()), "utf-8")
    (folder / "task.jsonl").write_text('{"context": "a", "target": "b"}\n', "utf-8")
    return folder


def no_long_work(*_, **__):
    raise AssertionError("weights are read before the input is checked")


def refusal(arguments, folder, capsys, monkeypatch):
    """The one line on stderr of a command that must end with exit code 2, and read and write nothing before."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(CheckpointReader, "read", no_long_work)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(no_long_work))
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as error:
        main(arguments)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert error.value.code == 2 and captured.out == "" and line.startswith("optimum-dern: error: ")
    assert "--traceback shows where" not in line
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize(("command", "action", "value"), option_rows())
def test_options(command, action, value, folder, capsys, monkeypatch):
    """The line names the option or the value, and what to do."""
    option, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
    given = [f"{option}={value}"] if value.startswith("-") and count == 1 else [option, *[value] * count]
    line = refusal([*BASE[command], *given], folder, capsys, monkeypatch)
    assert value in line or option in line or action.dest in line
    assert any(
        word in line
        for word in ("give", "choose", "leave", "must be", "must map", "--help", "it has", "make it first")
    ), line


def test_every_command_has_a_call():
    assert BASE.keys() == dict(parsers()).keys()


TOGETHER = {  # options that contradict each other, or have no effect beside one another
    "two amounts": ["inspect", "model", "--num-experts", "4", "--sparsity", "0.5"],
    "two widths": ["inspect", "model", "--width", "8", "--width-sparsity", "0.5"],
    "no refit": ["compress", "model", "out", "--no-refit", "--neuron-refit"],
    "oneshot": ["compress", "model", "out", "--calibration-order", "oneshot", "--drift-correction", "0.5"],
    "no text": ["compress", "model", "out", "--evaluation-length", "64"],
    "shares": ["compress", "model", "out", "--self-share", "0.5", "--random-share", "0.5"],
    "itself": ["compress", "model", "model"],
    "a file": ["compress", "model", "text.txt"],
    "nothing": ["evaluate", "model"],
    "no tasks": ["evaluate", "model", "--data", "text.txt", "--tasks-folder", "."],
    "no original": ["evaluate", "model", "--data", "text.txt", "--cache", "kept"],
    "no data": ["evaluate", "model", "--tasks", "task.jsonl", "--against", "model"],
    "nothing to compare": ["compare", "model", "model", "--no-speed"],
    "no domain": ["attribute", "model", "out", "--data", "a=text.txt", "--mask-experts", "1"],
    "twice": ["attribute", "model", "out", "--data", "a=text.txt", "a=text.txt"],
    "of another method": ["merge", "model", "model", "model", "out", "--method", "ties", "--epochs", "2"],
    "one text": ["merge", "model", "model", "model", "out", "--data", "a=text.txt"],
    "one checkpoint": ["merge", "model", "model", "out", "--method", "ties"],
    "there already": ["sample", "model", "task.jsonl"],
    "no report": ["report", "model", "--card", "--output", "page.html"],
    "no library": ["patterns", "list", "model"],
    "unknown option": ["compress", "model", "out", "--num-expert-s", "4"],
    "unknown command": ["shrink", "model"],
    "no command": [],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name, folder, capsys, monkeypatch):
    refusal(TOGETHER[name], folder, capsys, monkeypatch)
