"""A config and tensors of different dtypes: computed as transformers loads it, and said where results are rounded."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny import compress, make_model, padded_batch, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.format.precision import loading_dtype
from optimum_dern.checkpoint.source.find import find_checkpoint
from optimum_dern.evaluation.loss.streamed import StreamedCheckpoint
from optimum_dern.models.loading import load_model
from optimum_dern.results.report import CompressionReport


QUICK = {"num_experts": 4, "batch_size": 4, "neuron_refit": False, "router_refit": False}


def write(folder, stored, in_config):
    """A checkpoint whose tensors have one dtype and whose config has another, or none."""
    make_model("mixtral").to(getattr(torch, stored)).save_pretrained(folder, max_shard_size="60KB")
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    del config["dtype"]
    file.write_text(json.dumps(config | ({"torch_dtype": in_config} if in_config else {})), "utf-8")


def weights(folder):
    """All tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("stored", "in_config"),
    [
        ("bfloat16", None),
        ("float32", None),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_as_transformers_loads_it(stored, in_config, tmp_path, caplog):
    """Streamed and loaded: one dtype, equal logits.  Compressed: equal to the bit, once both are rounded alike."""
    source, computed = tmp_path / "source", in_config or stored
    write(source, stored, in_config)
    model, batch = load_model(str(source), "cpu"), padded_batch([12, 9], "right")
    with torch.no_grad():
        expected = model(**batch).logits
    (found,) = StreamedCheckpoint(source, torch.device("cpu")).stream_logits([batch])
    assert found.dtype == expected.dtype == getattr(torch, computed)
    torch.testing.assert_close(found, expected)
    with caplog.at_level(logging.WARNING, "optimum_dern"):
        report = DernCompressor(dataset=random_tokens(), **QUICK).compress_checkpoint(source, tmp_path / "disk")
    said = f"is computed in {computed}, in which transformers loads it, and written in {stored}, in which it is stored"
    assert (said in caplog.text) == (computed != stored)
    assert report.precision == {"stored": stored, "computed": computed, "written": stored}
    assert CompressionReport.load(tmp_path / "disk" / "dern_report.json").precision == report.precision
    compressor = compress(model, **QUICK)
    compressor.save(model, tmp_path / "memory")
    assert compressor.report.precision == {"computed": computed, "written": computed}
    disk, memory = weights(tmp_path / "disk"), weights(tmp_path / "memory")
    experts = [name for name in disk if ".experts." in name]
    assert experts and all(torch.equal(disk[name], memory[name].to(disk[name].dtype)) for name in experts)
    configs = [json.loads((tmp_path / name / "config.json").read_text("utf-8")) for name in ("disk", "memory")]
    assert configs[0] == configs[1]


def test_written_as_it_was_computed(tmp_path, caplog):
    """With its dtype the result is, to the bit, that of the model in memory, and nothing needs to be said."""
    write(tmp_path / "source", "bfloat16", "float32")
    with caplog.at_level(logging.WARNING, "optimum_dern"):
        compressor = DernCompressor(dataset=random_tokens(), **QUICK)
        compressor.compress_checkpoint(tmp_path / "source", tmp_path / "disk", dtype="float32")
    assert "is computed in" not in caplog.text
    model = load_model(str(tmp_path / "source"), "cpu")
    compress(model, **QUICK).save(model, tmp_path / "memory")
    disk, memory = weights(tmp_path / "disk"), weights(tmp_path / "memory")
    assert all(torch.equal(tensor, disk[name].float()) for name, tensor in memory.items())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"b": "F32", "a": "BF16"}, torch.bfloat16),
        ({"a": "F8_E4M3", "b": "I64", "c": "F16"}, torch.float16),
        ({"b": "U8", "a": "I64"}, torch.int64),
        ({}, None),
    ],
)
def test_the_first_floating_tensor(names, expected):
    """In the order of the names, as transformers reads a file; what no model is built in is passed over."""
    assert loading_dtype(names) == expected


def test_without_weights_and_dtype(tmp_path):
    """A config alone that has no dtype is a model in torch's own."""
    write(tmp_path, "bfloat16", None)
    for file in tmp_path.glob("model*"):
        file.unlink()
    assert find_checkpoint(tmp_path, need_weights=False).skeleton.dtype == torch.float32
