"""Command-line options to a `DernConfig`."""

import argparse
import dataclasses
import json

import pytest

from optimum_dern import DernConfig
from optimum_dern.checkpoint.output.shards import parse_bytes
from optimum_dern.commands.main import COMMANDS
from optimum_dern.commands.shared.arguments import add_config_arguments, check_model_name, config_from_arguments
from optimum_dern.options import GROUPS


def parse(*arguments):
    """The config that the options describe."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_config_arguments(parser)
    return config_from_arguments(parser.parse_args(arguments))


def parse_several(*arguments):
    """The config and the amounts that the options of a command for several results describe."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_config_arguments(parser, several=True)
    args = parser.parse_args(arguments)
    return config_from_arguments(args), getattr(args, "amounts", {})


def test_no_option_is_the_default():
    """What is not given stays with the config's own defaults."""
    assert parse() == DernConfig()


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ("--num-experts 4", {"num_experts": 4}),
        ("--sparsity .25 --preset paper", {"sparsity": 0.25, "preset": "paper"}),
        ("--preset paper --refit --guard", {"preset": "paper", "refit": True, "guard": True}),
        ("--no-refit --no-importance-weighting", {"refit": False, "importance_weighting": False}),
        ("--similarity-weights 1 .5 2", {"similarity_weights": (1, 0.5, 2)}),
        ("--similarity-threshold -0.5", {"similarity_threshold": -0.5}),
        ("--refit-ridge 1e-3 --seed 7", {"refit_ridge": 1e-3, "seed": 7}),
        ("--refit-sweeps 2 --no-guard", {"refit_sweeps": 2, "guard": False}),
        ('--protect-experts {"0":[1],"3":[2,2]}', {"protect_experts": {0: [1], 3: [2]}}),
        ("--method cd_moe --condensed-layers 3 5", {"method": "cd_moe", "condensed_layers": [3, 5]}),
        ("--method cd_moe --condensed-layers [3] [5,4]", {"method": "cd_moe", "condensed_layers": [3, 4, 5]}),
        ("--method cd_moe --condensed-layers [3]", {"method": "cd_moe", "condensed_layers": [3]}),
        ("--method cd_moe --condensed-layers 3", {"method": "cd_moe", "condensed_layers": 3}),
        ("--cluster-init random --router-update rows", {"cluster_init": "random", "router_update": "rows"}),
    ],
)
def test_fields(arguments, fields):
    """Each option sets the field of its name."""
    assert parse(*arguments.split()) == DernConfig(**fields)


def test_help_is_grouped():
    """`compress --help` lists every field once, under its group, and the groups from what to ablations."""
    titles = ["what", "how much", "data", "how", "for ablations"]
    assert list(GROUPS) == titles
    parser = argparse.ArgumentParser()
    COMMANDS["compress"].add_arguments(parser)
    printed = [line[:-1] for line in parser.format_help().splitlines() if line.endswith(":") and line[0] != " "]
    assert printed[-len(titles) :] == titles
    listed = {g.title: [a.dest for a in g._group_actions] for g in parser._action_groups if g.title in titles}
    fields = [field for field in dataclasses.fields(DernConfig) if field.name != "quant_method"]
    assert listed == {title: [f.name for f in fields if f.metadata["group"] == title] for title in titles}
    assert sum(map(len, listed.values())) == len(fields)


def numeric_options():
    """Every option of every command that takes numbers, and how many of them."""
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        for action in parser._actions:
            if callable(action.type) and action.metavar in ("N", "X", ("GATE", "UP", "DOWN")):
                yield pytest.param(module, action, id=f"{name}{action.option_strings[0]}")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(("module", "action"), numeric_options())
def test_numbers_are_finite(module, action, text):
    """NaN and infinities are refused, by the parser or by the config."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    count = action.nargs if isinstance(action.nargs, int) else 1
    given = [f"{action.option_strings[0]}={text}"] if count == 1 else [action.option_strings[0], "1", "1", text]
    names = ["model", "output"][: sum(not a.option_strings for a in parser._actions)]
    with pytest.raises((argparse.ArgumentError, ValueError, SystemExit)):
        config_from_arguments(parser.parse_args([*names, *given]))


@pytest.mark.parametrize("size", ["nan", "inf", "-inf", "infGiB", "1e999"])
def test_sizes_are_finite(size):
    """Those of --max-memory and --max-shard-size."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(size)


@pytest.mark.parametrize("fields", [{"guard": 1}, {"neuron_refit": "no"}, {"seed": None}, {"seed": 1.5}])
def test_values_of_another_kind(tmp_path, fields):
    """A file's are checked like those of keywords, and so is what an option's own parser lets through."""
    (tmp_path / "config.json").write_text(json.dumps(fields), "utf-8")
    with pytest.raises(ValueError, match="but it must be"):
        parse("--config", str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="seed=-1, but it must be"):
        parse("--seed=-1")


@pytest.mark.parametrize(
    ("sources", "dataset"),
    [
        (["c4"], "c4"),
        (["my notes.txt"], "my notes.txt"),
        (["a=b.txt"], "a=b.txt"),
        (["a.txt=2"], {"a.txt": 2.0}),
        (["a.txt", "c4"], {"a.txt": 1.0, "c4": 1.0}),
        (["code.jsonl=2", "wikitext2=0.5"], {"code.jsonl": 2.0, "wikitext2": 0.5}),
        (["a=b.txt=3", "c4"], {"a=b.txt": 3.0, "c4": 1.0}),
    ],
)
def test_datasets(sources, dataset):
    """One source is taken as it is; several, or one with a weight, are a mix."""
    assert parse("--dataset", *sources).dataset == dataset


@pytest.mark.parametrize(
    ("arguments", "fields", "amounts"),
    [
        ("", {}, {}),
        ("--num-experts 4", {"num_experts": 4}, {}),
        ("--num-experts=4", {"num_experts": 4}, {}),
        ("--num-experts 6 4 3", {"num_experts": 6}, {"num_experts": [6, 4, 3]}),
        ("--sparsity .25 .5", {"sparsity": 0.25}, {"sparsity": [0.25, 0.5]}),
        ("--sparsity .25 .5 --sparsity .75", {"sparsity": 0.75}, {}),  # as of any option, the last one counts
    ],
)
def test_several_amounts(arguments, fields, amounts):
    """The config gets the first amount, the command all of them where there are several."""
    assert parse_several(*arguments.split()) == (DernConfig(**fields), amounts)


def test_an_amount_that_is_none():
    """An option that has taken the positional arguments says where they belong; other commands take one amount."""
    with pytest.raises(argparse.ArgumentError, match="'./model' is not a number.*come before this option"):
        parse_several("--num-experts", "4", "./model")
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse("--num-experts", "4", "3")


@pytest.mark.parametrize("name", ["./missing", "/missing", "~/missing", "a/b/c"])
def test_paths_that_do_not_exist(name):
    """What can only be a path is not looked for on the Hub."""
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        check_model_name(name)


def test_names_that_may_be_on_the_hub(tmp_path):
    """Hub ids and folders pass."""
    for name in ("gpt2", "me/model", str(tmp_path)):
        check_model_name(name)
