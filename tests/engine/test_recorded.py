"""Statistics of one oneshot pass serve later runs without data; what needs no statistics needs no data at all."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, make_model, random_tokens, same_state, state_of
from transformers import AutoModelForCausalLM

from optimum_dern import CompressionReport, DernCompressor
from optimum_dern.checkpoint.format.reader import CheckpointReader
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.checkpoint.source.recorded import STATISTICS_NAME, RecordedStatistics
from optimum_dern.engine.walk import decoder as engine


DATA = random_tokens(12)
PRUNE = {"method": "prune", "preset": "paper", "batch_size": 4}
DERN = {"method": "dern", "preset": "paper", "batch_size": 4, "router_update": "rows"}
FAMILY = "deepseek_v3"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A source, and the file that a run over it has left; the data is not at hand any more."""
    folder = tmp_path_factory.mktemp("recorded")
    make_model(FAMILY).save_pretrained(folder / "source")
    compressor = DernCompressor(**PRUNE, dataset=DATA, num_experts=4)
    compressor.compress_checkpoint(folder / "source", folder / "first")
    return folder / "source", folder / "first" / STATISTICS_NAME


def weights(folder):
    """All tensors of a checkpoint in a single file."""
    return load_file(folder / "model.safetensors")


def test_what_is_recorded(recorded):
    """The sums of every MoE layer of the original model, in the report's own words."""
    statistics = RecordedStatistics(recorded[1])
    report = CompressionReport.load(recorded[1].parent / "dern_report.json")
    assert [layer.layer for layer in report.layers] == [1, 2]
    for layer in report.layers:
        sums = statistics.read(layer.layer)
        assert sums.tokens == layer.tokens == 12 * 24
        assert (sums.weight / sums.tokens).tolist() == layer.saliency
        assert (sums.count / sums.count.sum()).tolist() == layer.load
        assert sums.coactivation.shape == (EXPERTS, EXPERTS) and sums.output_sum.dtype == torch.float64
    assert statistics.description["calibration"] == report.calibration


def test_the_weights_beside_it_load(recorded):
    """An index tells readers that take every safetensors file for weights which one is."""
    folder = recorded[1].parent
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    assert index["weight_map"] == dict.fromkeys(weights(folder), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(folder).values())
    assert AutoModelForCausalLM.from_pretrained(folder).config.n_routed_experts == 4


CONFIGS = {
    "reap": PRUNE | {"selection": "reap", "num_experts": 6},
    "hope": PRUNE | {"selection": "hope", "num_experts": 4},
    "msan, super": PRUNE | {"selection": "msan", "sparsity": 0.5, "protect_experts": "super"},
    "dern": DERN | {"num_experts": 4},
    "dern, random centroids": DERN | {"cluster_init": "random", "selection": "frequency", "num_experts": 6},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_without_data(name, recorded, tmp_path, monkeypatch):
    """Further ratios, criteria and methods give the bits of a run with data, and the model is never run."""
    (source, statistics), fields = recorded, CONFIGS[name]
    expected = DernCompressor(**fields, dataset=DATA).compress_checkpoint(source, tmp_path / "data")
    monkeypatch.setattr(engine, "record_layer_calls", None)
    report = DernCompressor(**fields).compress_checkpoint(source, tmp_path / "recorded", statistics=statistics)
    assert same_state(weights(tmp_path / "recorded"), weights(tmp_path / "data"))
    for mine, theirs in zip(report.layers, expected.layers, strict=True):
        assert {**vars(mine), "seconds": 0} == {**vars(theirs), "seconds": 0}
    assert report.calibration == expected.calibration
    assert report.config == expected.config
    assert not (tmp_path / "recorded" / STATISTICS_NAME).exists()
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "recorded")
    assert checkpoint.config.n_routed_experts == report.after.experts


def test_several_results(recorded, tmp_path, monkeypatch):
    """One file, one reading of the source, several ratios; an interruption changes nothing."""
    (source, statistics), readers, init = recorded, [], CheckpointReader.__init__
    compressor = DernCompressor(**PRUNE)
    amounts = {"num_experts": [6, 4], "statistics": statistics}
    note = Manifest.finish_layer

    def interrupted(self, position, value):
        note(self, position, value)
        if position == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress_checkpoint(source, tmp_path / "part", **amounts)
    compressor.compress_checkpoint(source, tmp_path / "part", **amounts)
    monkeypatch.setattr(CheckpointReader, "__init__", lambda self, f: (init(self, f), readers.append(self))[0])
    compressor.compress_checkpoint(source, tmp_path / "whole", **amounts)
    assert readers[0].bytes <= readers[0].bytes_read <= 1.05 * readers[0].bytes
    for name in ("6-experts", "4-experts"):
        assert same_state(weights(tmp_path / "part" / name), weights(tmp_path / "whole" / name))
    assert same_state(weights(tmp_path / "whole" / "4-experts"), weights(statistics.parent))


def test_recorded_by_a_run_of_several_that_was_interrupted(recorded, tmp_path, monkeypatch):
    """The file lies in the folder of all results, and is that of an undisturbed run of one."""
    source, statistics = recorded
    compressor, note = DernCompressor(**PRUNE, dataset=DATA), Manifest.finish_layer

    def interrupted(self, position, value):
        note(self, position, value)
        if position == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress_checkpoint(source, tmp_path, num_experts=[6, 4])
    compressor.compress_checkpoint(source, tmp_path, num_experts=[6, 4])
    assert (tmp_path / STATISTICS_NAME).read_bytes() == statistics.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["4-experts", "6-experts", STATISTICS_NAME]


def test_sequential_runs_record_nothing(recorded, tmp_path):
    """What later layers see of compressed ones is of no use to another ratio."""
    options = PRUNE | {"calibration_order": "sequential", "num_experts": 4, "dataset": DATA}
    DernCompressor(**options).compress_checkpoint(recorded[0], tmp_path)
    assert not (tmp_path / STATISTICS_NAME).exists()
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_copy_of_the_model_is_the_same_model(recorded, tmp_path):
    """Where its files lie, in how many pieces and how old they are says nothing about a model."""
    AutoModelForCausalLM.from_pretrained(recorded[0]).save_pretrained(tmp_path / "copy", max_shard_size="60KB")
    shutil.copy(recorded[0] / "config.json", tmp_path / "copy" / "config.json")
    for file in (tmp_path / "copy").iterdir():
        os.utime(file, (0, 0))
    compressor = DernCompressor(**PRUNE, num_experts=4, dataset=DATA)  # the data may be given, and is then compared
    compressor.compress_checkpoint(tmp_path / "copy", tmp_path / "out", statistics=recorded[1])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"refit": True, "router_refit": False, "neuron_refit": False}, "refit fits experts to tokens"),
        ({"guard": True}, "guard judges"),
        ({"selection": "greedy"}, "selection='greedy' works on tokens"),
        ({"selection": "easy_ep"}, "selection='easy_ep' works on tokens"),
        ({"method": "ream"}, "method='ream' works on tokens"),
        ({"calibration_order": "sequential"}, "calibration_order='sequential'"),
    ],
)
def test_what_needs_more_than_statistics(fields, reason, recorded, tmp_path):
    """A config that works on tokens is refused with the reason, before anything is written."""
    compressor = DernCompressor(**PRUNE | {"num_experts": 4} | fields)
    with pytest.raises(ValueError, match=f"{reason}.*leave statistics out"):
        compressor.compress_checkpoint(recorded[0], tmp_path / "out", statistics=recorded[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["weights", "one expert", "config", "data", "dtype"])
def test_statistics_of_something_else(change, recorded, tmp_path):
    """The message names what is not the same."""
    source, options, call = recorded[0], PRUNE | {"num_experts": 4}, {}
    match = {"config": "another model config", "data": "another calibration data", "dtype": "another dtype"}
    if change in ("weights", "one expert", "config"):
        source = shutil.copytree(recorded[0], tmp_path / "source")
    if change == "weights":
        make_model(FAMILY, seed=1).save_pretrained(source)
    if change == "one expert":
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.2.mlp.experts.5.up_proj.weight"].mul_(2)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if change == "config":
        config = json.loads((source / "config.json").read_text("utf-8"))
        (source / "config.json").write_text(json.dumps({**config, "routed_scaling_factor": 1.5}), "utf-8")
    if change == "data":
        options["dataset"] = random_tokens(12, seed=1)
    if change == "dtype":
        call["dtype"] = "bfloat16"
    with pytest.raises(ValueError, match=match.get(change, r"another model \(weights\) \(it is of .*source")):
        DernCompressor(**options).compress_checkpoint(source, tmp_path / "out", statistics=recorded[1], **call)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_statistics(recorded, tmp_path):
    """A missing file, another safetensors file, any other file, and one that lacks a sum that this release reads."""
    source, statistics = recorded
    (tmp_path / "text").write_text("notes", "utf-8")
    tensors = load_file(statistics)
    del tensors["2.output_sum"]
    description = json.dumps(RecordedStatistics(statistics).description)
    save_file(tensors, tmp_path / "old", metadata={"dern_statistics": description})
    cases = {
        tmp_path / "missing": "there is no statistics file",
        source / "model.safetensors": "is not a dern_statistics",
        tmp_path / "text": "is not a dern_statistics",
        tmp_path / "old": "written by another release: it has no 2.output_sum",
    }
    for path, match in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            DernCompressor(**PRUNE).compress_checkpoint(source, tmp_path / "out", statistics=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields", [{"selection": "aimer"}, {"selection": "random", "seed": 3}, DERN | {"selection": "aimer"}]
)
@pytest.mark.parametrize("order", ["oneshot", "sequential"])
def test_no_data_at_all(fields, order, recorded, tmp_path):
    """What looks at weights alone, or at nothing, needs no data, and gives what it gives with some."""
    options = PRUNE | {"num_experts": 4, "calibration_order": order} | fields
    model, with_data = make_model(FAMILY), make_model(FAMILY)
    compressor = DernCompressor(**options)
    compressor.compress_model(model)
    DernCompressor(**options, dataset=DATA).compress_model(with_data)
    assert same_state(state_of(model), state_of(with_data))
    assert (compressor.report.calibration["tokens"], compressor.report.config["dataset"]) == (0, None)
    report = compressor.compress_checkpoint(recorded[0], tmp_path)
    assert same_state(weights(tmp_path), weights_as_saved(model, tmp_path / "memory"))
    assert [layer.retained for layer in report.layers] == [layer.retained for layer in compressor.report.layers]
    assert "--dataset" not in (tmp_path / "README.md").read_text("utf-8")


def weights_as_saved(model, folder):
    """A model's tensors under the names that its family stores."""
    model.save_pretrained(folder)
    return weights(folder)


def test_data_that_is_missing():
    """A criterion that needs statistics, or the search for super experts, is run on text that the model writes."""
    for fields in ({}, {"selection": "aimer", "protect_experts": "super"}, {"selection": "random", "guard": True}):
        compressor = DernCompressor(**PRUNE | {"num_experts": 4, "num_samples": 3, "sequence_length": 20} | fields)
        compressor.compress_model(make_model(FAMILY))
        assert compressor.report.calibration | {"sha256": ""} == {
            "dataset": "self",
            "sources": {"self": 3},
            "sha256": "",
            "sequences": 3,
            "tokens": 60,
        }
