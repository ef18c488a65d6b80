"""Several sets of weights in one folder: everybody takes what transformers takes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import compress, make_model, padded_batch, random_tokens, same_state, tiny_tokenizer

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.format.weight_files import (
    INDEX_NAME,
    SINGLE_NAME,
    has_weights,
    weight_files,
    weight_names,
)
from optimum_dern.evaluation.compare.model_session import ModelSession
from optimum_dern.evaluation.loss.streamed import StreamedCheckpoint
from optimum_dern.models.loading import load_model


QUICK = {"num_experts": 4, "batch_size": 4, "neuron_refit": False, "router_refit": False}


@torch.no_grad()
def logits(folder):
    """Of the loaded model and of the streamed one; equal."""
    batch = padded_batch([12, 9], "right")
    loaded = load_model(str(folder), "cpu")(**batch).logits
    (streamed,) = StreamedCheckpoint(folder, torch.device("cpu")).stream_logits([batch])
    torch.testing.assert_close(streamed, loaded, atol=1e-5, rtol=1e-5)
    return loaded


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in a single file, another one in shards, and the single file beside the shards."""
    root = tmp_path_factory.mktemp("weights")
    make_model("mixtral").save_pretrained(root / "single")
    make_model("mixtral", seed=1).save_pretrained(root / "shards", max_shard_size="60KB")
    shutil.copytree(root / "shards", root / "both")
    shutil.copy(root / "single" / SINGLE_NAME, root / "both" / SINGLE_NAME)
    return root


def test_a_single_file_beside_older_shards(folders, tmp_path):
    """In memory, streamed and compressed, the folder is the model of its single file."""
    assert [file.name for file in weight_files(folders / "both")] == [SINGLE_NAME]
    assert torch.equal(logits(folders / "both"), logits(folders / "single"))
    assert not torch.allclose(logits(folders / "both"), logits(folders / "shards"), atol=0.1)
    for name in ("both", "single"):
        DernCompressor(dataset=random_tokens(), **QUICK).compress_checkpoint(folders / name, tmp_path / name)
    assert same_state(*(load_file(tmp_path / name / SINGLE_NAME) for name in ("both", "single")))


def test_bytes_on_disk(folders):
    """Weights that are not loaded are not counted."""
    tiny_tokenizer().save_pretrained(folders / "both")
    size = ModelSession(str(folders / "both"), "cpu", {"dtype": "auto"}).size()
    assert size["disk_bytes"] == (folders / "single" / SINGLE_NAME).stat().st_size


def test_an_index_that_names_less_than_its_shards_hold(folders, tmp_path):
    """All tensors of the listed files are loaded, listed or not; files that are not listed stay out."""
    source = shutil.copytree(folders / "shards", tmp_path / "source")
    index = json.loads((source / INDEX_NAME).read_text("utf-8"))
    kept = {name: file for file, name in {file: name for name, file in index["weight_map"].items()}.items()}
    assert 1 < len(kept) < len(index["weight_map"])  # one tensor a file
    (source / INDEX_NAME).write_text(json.dumps({**index, "weight_map": kept}), "utf-8")
    save_file({"model.norm.weight": torch.zeros(32)}, source / "model-00099-of-00099.safetensors", {"format": "pt"})
    assert torch.equal(logits(source), logits(folders / "shards"))
    for name, folder in (("part", source), ("whole", folders / "shards")):
        DernCompressor(dataset=random_tokens(), **QUICK).compress_checkpoint(folder, tmp_path / name)
    part, whole = ({f.name: f.read_bytes() for f in (tmp_path / n).glob("model*")} for n in ("part", "whole"))
    assert part == whole


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_file_that_the_config_names(folders, tmp_path, in_memory):
    """It goes before any other, is needed, and is not named in what is written."""
    source = shutil.copytree(folders / "shards", tmp_path / "source")
    shutil.copy(folders / "single" / SINGLE_NAME, source / "own.safetensors")
    config = json.loads((source / "config.json").read_text("utf-8")) | {"transformers_weights": "own.safetensors"}
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    assert torch.equal(logits(source), logits(folders / "single"))
    if in_memory:
        model = load_model(str(source), "cpu")
        compress(model, **QUICK).save(model, tmp_path / "out")
    else:
        DernCompressor(dataset=random_tokens(), **QUICK).compress_checkpoint(source, tmp_path / "out")
    assert logits(tmp_path / "out").isfinite().all()
    (source / "own.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no own\.safetensors"):
        weight_files(source)


def test_whether_weights_are_there(folders, tmp_path):
    """A folder with an index alone names its shards and has none of them; one without anything names none."""
    shutil.copy(folders / "shards" / INDEX_NAME, tmp_path)
    assert len(weight_names(tmp_path)) > 1 and not has_weights(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert weight_names(tmp_path) == [] and not has_weights(tmp_path)
    assert all(has_weights(folders / name) for name in ("single", "shards", "both"))
