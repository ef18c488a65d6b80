"""Libraries of patterns, and models loaded with the experts of a task: what is read, and what comes out."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, make_model, runnable
from safetensors.torch import save_file
from tiny import compress, random_tokens, same_state, tiny_tokenizer
from tiny import make_model as tiny_model
from transformers import AutoModelForCausalLM

from optimum_dern import load_for
from optimum_dern.checkpoint.source.find import find_checkpoint
from optimum_dern.commands.main import main
from optimum_dern.models.moe.structure import find_moe_layers, layers_by_position
from optimum_dern.patterns import PatternLibrary, build_patterns
from optimum_dern.patterns import library as library_module
from optimum_dern.patterns.load import load_experts


TWO_STACKS = ("diffusion_gemma",)
KEPT = [0, 2, 5, 7]  # two of each group of four


def batches(seed, rows=3):
    found = []
    for row in random_tokens(rows, seed=seed):
        ids = row["input_ids"].view(1, -1)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns") / "model"
    tiny_model("mixtral", vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def library(checkpoint):
    return build_patterns(checkpoint, {"one": batches(1), "two": batches(2)})


def test_scores_of_all_layers(checkpoint, library):
    """The mean over a task's tokens of the largest logit, by expert, of the model run as a whole."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    layers, logits = find_moe_layers(model), []
    handles = [
        layer.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: logits.append(args[0].flatten(0, -2) @ layer.router_weight.tensor.T)
        )
        for layer in layers
    ]
    with torch.no_grad():
        for batch in batches(2):
            model(**batch)
    for handle in handles:
        handle.remove()
    for number in range(len(layers)):
        own = torch.cat(logits[number :: len(layers)]).double()
        expected = torch.zeros(8, dtype=torch.float64)
        for row in own:
            expected[row.argmax()] += row.max()
        torch.testing.assert_close(library.scores["two"][number], expected / len(own), rtol=1e-4, atol=1e-6)
    assert library.tasks["two"] == {"tokens": len(own)}


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in runnable(FAMILIES) if f.values[0] not in TWO_STACKS])
def test_every_family_as_if_pruned(family, tmp_path):
    """To the bit the model that pruning to the same experts gives, in every layout; and less is read."""
    model = make_model(family)
    model.save_pretrained(tmp_path)
    found = find_checkpoint(tmp_path)
    places = layers_by_position(found.skeleton, find_moe_layers(found.skeleton))
    part = load_experts(found, dict.fromkeys(places, torch.tensor(KEPT)), torch.device("cpu"))
    read = found.reader.bytes_read
    protected = dict.fromkeys(places, KEPT)
    compress(model, method="prune", preset="paper", selection="random", protect_experts=protected, dataset=None)
    assert same_state(model.state_dict(), part.state_dict())
    part.config._name_or_path = model.config._name_or_path
    for config in (part.config, model.config):
        config.architectures = None  # set where a model is saved
    assert json.loads(part.config.to_json_string()) == json.loads(model.config.to_json_string())
    experts = sum(p.numel() for layer in find_moe_layers(part) for p in layer.experts.parameters())
    assert read <= found.reader.bytes - 4 * experts  # as many were not read as were


def test_load_for_a_task_and_a_prompt(checkpoint, library, tmp_path):
    """The experts of largest score of every layer; a prompt takes the task whose key is nearest."""
    library.save(tmp_path)
    model = load_for(checkpoint, tmp_path, task="two", num_experts=4)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    for number, (layer, full) in enumerate(zip(find_moe_layers(model), find_moe_layers(whole), strict=True)):
        kept = library.scores["two"][number].topk(4).indices.sort().values
        assert torch.equal(layer.experts.down_proj, full.experts.down_proj[kept])
        assert torch.equal(layer.router_weight.tensor, full.router_weight.tensor[kept])
    assert model.task == "two" and model.config.num_local_experts == 4
    prompt = tiny_tokenizer().decode(batches(1)[0]["input_ids"][0])
    by_prompt = load_for(checkpoint, library, prompt=prompt, num_experts=4)
    distances = dict(library.nearest(library.scores["one"][0]))
    assert distances["one"] == 0 < distances["two"]
    assert by_prompt.task in ("one", "two") and by_prompt.bytes_read > model.bytes_read


def test_a_library_survives_its_folder(library, tmp_path):
    library.save(tmp_path / "deep" / "library")
    again = PatternLibrary.load(tmp_path / "deep" / "library")
    assert again.tasks == library.tasks and again.layers == library.layers
    assert all(torch.equal(again.scores[task], library.scores[task]) for task in library.scores)


@pytest.mark.parametrize("when", ["save_file", "json_text"])
def test_an_earlier_library_stays_until_both_files_are_written(library, tmp_path, monkeypatch, when):
    """Scores of one library never stand beside the facts of another."""
    library.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = replace(library, settings={"top": 2, "confidence": None})

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(library_module, when, fail)
    with pytest.raises(OSError, match="No space"):
        other.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    renamed, replace_file = [], os.replace

    def spy(*names):
        renamed.append({file.name for file in tmp_path.iterdir()})
        replace_file(*names)

    monkeypatch.setattr(os, "replace", spy)
    other.save(tmp_path)
    assert len(renamed) == 2 and not any("library.json" in names for names in renamed)
    assert PatternLibrary.load(tmp_path).settings["top"] == 2


def broken(folder, how):
    if how == "missing":
        (folder / "library.json").unlink()
    elif how == "json":
        (folder / "library.json").write_text("{")
    elif how == "format":
        facts = json.loads((folder / "library.json").read_text())
        (folder / "library.json").write_text(json.dumps(facts | {"format": 7}))
    elif how == "scores":
        save_file({"one": torch.zeros(2, 8)}, folder / "patterns.safetensors")
    else:
        (folder / "patterns.safetensors").write_bytes(b"1")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "holds no library"),
        ("json", "broken library"),
        ("format", "has the format 7, this release reads 1"),
        ("scores", "of other tasks or layers"),
        ("truncated", "broken library"),
    ],
)
def test_broken_libraries(library, tmp_path, how, message):
    library.save(tmp_path)
    broken(tmp_path, how)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        PatternLibrary.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "three", "num_experts": 4}, "no task 'three'; it has one, two"),
        ({"num_experts": 4}, "either a task of the library or a prompt"),
        ({"task": "one", "prompt": "x", "num_experts": 4}, "either a task"),
        ({"task": "one", "num_experts": 1}, "needs at least 2"),
        ({"task": "one", "num_experts": 9}, "each layer has 8 experts"),
    ],
)
def test_refused(checkpoint, library, options, message):
    with pytest.raises(ValueError, match=message):
        load_for(checkpoint, library, **options)


def test_another_model_is_refused(library, tmp_path):
    tiny_model("mixtral", seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the library is of 'model', not of"):
        load_for(tmp_path, library, task="one", num_experts=4)


@pytest.mark.parametrize(
    ("options", "message"), [({"top": 9}, "top=9"), ({"confidence": 1.0}, "it is a probability"), ({}, "no task")]
)
def test_build_refuses(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        build_patterns(checkpoint, {"one": batches(1)} if options else {}, **options)


def test_the_commands(checkpoint, tmp_path, capsys):
    """Build, list and match; a library that is there stays without --overwrite."""
    for name, text in (("digits", "0123456789 " * 200), ("letters", "abcdefghij " * 200)):
        (tmp_path / f"{name}.txt").write_text(text)
    data = [f"{name}={tmp_path / f'{name}.txt'}" for name in ("digits", "letters")]
    build = [
        "patterns",
        "build",
        str(checkpoint),
        str(tmp_path / "library"),
        "--task",
        *data,
        "--sequence-length",
        "64",
    ]
    main([*build, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["tasks"]) == {"digits", "letters"} and facts["layers"] == [0, 1]
    main(["patterns", "list", str(tmp_path / "library")])
    assert "letters" in capsys.readouterr().out
    prompt = ["--prompt", "0123456789 012345", "--model", str(checkpoint), "--json"]
    main(["patterns", "match", str(tmp_path / "library"), *prompt])
    assert json.loads(capsys.readouterr().out)["task"] == "digits"
    for name in ("patterns.safetensors", "library.json"):  # also one of them alone, which a killed run has left
        with pytest.raises(SystemExit):
            main(build)
        assert "--overwrite" in capsys.readouterr().err
        (tmp_path / "library" / name).unlink()
