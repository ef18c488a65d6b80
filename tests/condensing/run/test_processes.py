"""Layers condensed by two processes: the result of one, shared work, one that writes, and resumed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from families import make_model
from safetensors.torch import load_file
from tiny import make_model as make_tiny
from tiny import random_tokens

from optimum_dern import DernCompressor
from optimum_dern.condensing import layer_search
from optimum_dern.core.merging import condense


LENGTHS = [5, 24, 17, 9, 24, 3, 24, 11, 24, 24, 8, 24]
CASES = {  # model, options
    "searched": ("qwen3_moe", {"condensed_layers": 2}),
    "named": ("qwen3_moe", {"condensed_layers": [1], "batch_size": 4}),
    "shared experts": ("deepseek_v3", {"condensed_layers": 2, "preset": "paper"}),
    "all experts": ("qwen3_moe", {}),  # the other form, in an ordinary run
}
FIELDS = {"method": "cd_moe", "num_experts": 2, "self_share": 0.0, "random_share": 0.0}
SEARCHED, COMPARED = 60, 40  # fewer tokens than there are, so that they are chosen

# Runs all cases, the first one stopped after a layer, and notes what this process has run, tried and written.
WORKER = """
import json, os, sys
from optimum_dern import DernCompressor
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.checkpoint.output.shards import ShardWriter
from optimum_dern.condensing import condense as condensing, layer_search
from optimum_dern.core.merging import condense
from optimum_dern.machine.processes import joined_processes

folder, fields, layer_search.SEARCHED, condense.TOKENS = sys.argv[1], *map(json.loads, sys.argv[2:])
notes = {"tokens": 0, "tried": [], "written": 0, "made": []}
measure, divergence = condensing.measure_layer, layer_search._divergence
write, finish = ShardWriter.write, Manifest.finish_layer

def noting_measure(layer, position, run, *others):
    notes["tokens"] += run.tokens
    return measure(layer, position, run, *others)

def noting_divergence(original, streams, masks, position):
    notes["tried"].append(position)
    return divergence(original, streams, masks, position)

def noting_write(*args):
    notes["written"] += 1
    return write(*args)

def noting_finish(self, position, note):
    finish(self, position, note)
    notes["made"].append(position)
    if len(notes["made"]) == 1:
        raise KeyboardInterrupt

condensing.measure_layer, layer_search._divergence = noting_measure, noting_divergence
ShardWriter.write, Manifest.finish_layer = noting_write, noting_finish
with joined_processes("cpu") as processes:
    for name, (family, options) in json.load(open(f"{folder}/cases.json")).items():
        compressor = DernCompressor(**fields, **options, dataset=f"{folder}/data.pt")
        places = f"{folder}/{family}", f"{folder}/{name} shared"
        try:
            compressor.compress_checkpoint(*places)
        except KeyboardInterrupt:
            compressor.compress_checkpoint(*places)
            with open(f"{folder}/notes {processes.rank}.json", "w") as file:
                json.dump(notes, file)
    processes.on_main(lambda: None)
os._exit(0)  # as the command does
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints and data, condensed by two processes."""
    folder = tmp_path_factory.mktemp("condensed")
    make_tiny("qwen3_moe", num_hidden_layers=4).save_pretrained(folder / "qwen3_moe")
    make_model("deepseek_v3").save_pretrained(folder / "deepseek_v3")
    rows = [random_tokens(1, length, seed)[0]["input_ids"] for seed, length in enumerate(LENGTHS)]
    torch.save(rows, folder / "data.pt")
    (folder / "cases.json").write_text(json.dumps(CASES), "utf-8")
    (folder / "worker.py").write_text(WORKER, "utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [folder / "worker.py", folder, *map(json.dumps, [FIELDS, SEARCHED, COMPARED])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, [*launcher, *arguments])]
    launched = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_result_of_one_process(name, folder, tmp_path, monkeypatch):
    """Same layers, experts, winners, errors and weights, up to the order of float32 sums."""
    family, options = CASES[name]
    monkeypatch.setattr(layer_search, "SEARCHED", SEARCHED)
    monkeypatch.setattr(condense, "TOKENS", COMPARED)
    compressor = DernCompressor(**FIELDS, **options, dataset=str(folder / "data.pt"))
    report = compressor.compress_checkpoint(folder / family, tmp_path / "out")
    shared = folder / f"{name} shared"
    found, expected = (load_file(one / "model.safetensors") for one in (shared, tmp_path / "out"))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert (found[tensor] - value).norm() <= 1e-4 * value.norm(), tensor
    configs = [json.loads((one / "config.json").read_text("utf-8")) for one in (shared, tmp_path / "out")]
    assert configs[0] == configs[1]
    layers = json.loads((shared / "dern_report.json").read_text("utf-8"))["layers"]
    assert len(layers) == len(report.layers)
    for mine, theirs in zip(layers, report.layers, strict=True):
        for fact in ("name", "tokens", "held_out_tokens", "retained", "winner", "dense"):
            assert mine[fact] == getattr(theirs, fact), fact
        assert mine["saliency"] == pytest.approx(theirs.saliency, rel=1e-5)
        assert mine["errors"] == pytest.approx(theirs.errors, rel=1e-3)
        assert (mine["divergence"] is None) == (theirs.divergence is None)
        assert theirs.divergence is None or mine["divergence"] == pytest.approx(theirs.divergence, rel=1e-3)


def test_the_work_is_shared(folder):
    """Tokens and trials are; one process writes, and a run that goes on repeats no layer."""
    notes = [json.loads((folder / f"notes {rank}.json").read_text("utf-8")) for rank in range(2)]
    assert sum(own["tokens"] for own in notes) == 4 * sum(LENGTHS) and min(own["tokens"] for own in notes) > 0
    assert [own["made"] for own in notes] == [[0, 1, 2, 3]] * 2
    assert [bool(own["written"]) for own in notes] == [True, False]
    tried = [len(own["tried"]) for own in notes]
    assert tried == [2 + 2, 2 + 1]  # of four layers, then of three
    assert not {*notes[0]["tried"][:2]} & {*notes[1]["tried"][:2]}
