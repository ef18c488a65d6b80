"""Counts that a config writes once a layer, as Hunyuan-A13B's does."""

import json

import families
import pytest
import tiny
from tiny import random_tokens, same_state, state_of

from optimum_dern import DernCompressor
from optimum_dern.commands.main import main
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.moe.view import write_counts_


FAMILY = "hunyuan_v1_moe"
FIELDS = {"num_experts": 4, "dataset": random_tokens(), "method": "prune", "preset": "paper", "batch_size": 4}


def save(folder, **values):
    """A checkpoint whose config has these values."""
    families.make_model(FAMILY).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8")) | values
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_one_repeated_value(tmp_path, capsys):
    """It is that value: inspected, and compressed on disk and in memory to what a single number gives."""
    from transformers import AutoModelForCausalLM

    source, plain = save(tmp_path / "list", moe_topk=[2, 2]), save(tmp_path / "plain")
    main(["inspect", str(source), "--num-experts", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["experts_per_token"] == 2
    for folder in (source, plain):
        DernCompressor(**FIELDS).compress_checkpoint(folder, folder / "out")
    config = json.loads((source / "out" / "config.json").read_text("utf-8"))
    assert (config["moe_topk"], config["num_experts"]) == ([2, 2], 4)
    loaded = [AutoModelForCausalLM.from_pretrained(folder / "out") for folder in (source, plain)]
    assert same_state(*map(state_of, loaded))
    model = AutoModelForCausalLM.from_pretrained(source)
    DernCompressor(**FIELDS).compress_model(model)
    assert same_state(state_of(model), state_of(loaded[0])) and model.config.moe_topk == [2, 2]


@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_several_values(command, tmp_path, capsys):
    """Refused by the key's name."""
    source = save(tmp_path / "source", moe_topk=[2, 3])
    rest = [str(tmp_path / "out"), "--dataset", str(tmp_path)] if command == "compress" else []
    with pytest.raises(SystemExit):
        main([command, str(source), *rest])
    error = capsys.readouterr().err
    assert "_per_tok is [2, 3]" in error or "moe_topk is [2, 3]" in error
    assert "one number, or a list that repeats one" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["n_group", "topk_group", "num_experts_per_tok"])
def test_every_count(key):
    """Of groups, too."""
    model = tiny.make_model("deepseek_v3")
    layer = find_moe_layers(model)[0]
    value = getattr(model.config, key)
    vars(model.config)[key] = [value] * 3
    again = find_moe_layers(model)[0]
    assert (again.top_k, again.num_groups, again.topk_group) == (layer.top_k, layer.num_groups, layer.topk_group)
    vars(model.config)[key] = [value, value + 1, value]
    with pytest.raises(ValueError, match=f"{key} is .{value}, {value + 1}, {value}.; layers with different numbers"):
        find_moe_layers(model)


def test_new_counts_keep_the_form():
    """A list of numbers of experts stays a list, in the config and in modules that have a copy of it."""
    model = tiny.make_model("olmoe")
    layers = find_moe_layers(model)
    model.config.moe_num_experts = [8, 8]
    model.model.num_experts = [8, 8]
    write_counts_(model, layers, 4)
    assert model.config.moe_num_experts == model.model.num_experts == [4, 4]
    assert model.config.num_experts == 4
