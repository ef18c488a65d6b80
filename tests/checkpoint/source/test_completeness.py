"""A checkpoint that lacks a weight is refused before anything long; what may be missing is not missed."""

import json
import logging
import shutil

import pytest
import torch
from families import make_model as make_family
from safetensors.torch import load_file, save_file
from tiny import make_model, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.source.find import find_checkpoint
from optimum_dern.commands.main import main
from optimum_dern.evaluation.loss.streamed import StreamedCheckpoint


QUICK = {"num_experts": 4, "batch_size": 4, "neuron_refit": False, "router_refit": False}
NEEDED = [
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",  # of a dense layer
    "model.layers.1.input_layernorm.weight",
    "model.layers.2.mlp.shared_experts.down_proj.weight",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    make_model("deepseek_v3").save_pretrained(folder)
    return folder


def without(source, folder, gone):
    """A copy of a checkpoint that lacks the tensors with these beginnings."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_weight_is_named(name, whole, tmp_path, capsys):
    """Compressing, evaluating layer by layer and inspecting refuse it; no data is read, nothing is written."""
    source = without(whole, tmp_path / "source", name)
    message = rf"{name}, which would be initialised anew: the checkpoint is incomplete"
    with pytest.raises(ValueError, match=message):
        DernCompressor(dataset=str(tmp_path / "none.txt"), **QUICK).compress_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        StreamedCheckpoint(source, torch.device("cpu"))
    with pytest.raises(SystemExit):
        main(["inspect", str(source), "--num-experts", "4"])
    error = capsys.readouterr().err
    assert name in error and ("set tie_word_embeddings" in error) == (name == "lm_head.weight")


def test_files_beside_are_named(whole, tmp_path):
    """An index that names less than what lies there is named with what it leaves out."""
    source = tmp_path / "source"
    make_model("mixtral").save_pretrained(source, max_shard_size="60KB")
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text("utf-8"))
    last = max(index["weight_map"].values())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != last}
    file.write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match=rf"others, which .* is incomplete \(beside it, and no part of it: {last}\)"):
        find_checkpoint(source)


def test_without_any_weights(whole, tmp_path):
    """A folder with a config alone can be inspected."""
    shutil.copy(whole / "config.json", tmp_path)
    assert find_checkpoint(tmp_path, need_weights=False).reader is None
    with pytest.raises(FileNotFoundError, match="neither"):
        find_checkpoint(tmp_path)


def test_a_tower_may_be_missing_as_a_whole(tmp_path, caplog):
    """Text does not go through it: a warning, and the same result; but not half of it."""
    make_family("qwen3_vl_moe").save_pretrained(tmp_path / "whole")
    source = without(tmp_path / "whole", tmp_path / "text", "model.visual.")
    half = without(tmp_path / "whole", tmp_path / "half", "model.visual.patch_embed")
    with caplog.at_level(logging.WARNING, "optimum_dern"):
        for name, folder in (("whole", tmp_path / "whole"), ("text", source)):
            DernCompressor(dataset=random_tokens(), **QUICK).compress_checkpoint(folder, tmp_path / "out" / name)
    assert f"{source} has no weights for model.visual, which text does not go through" in caplog.text
    results = [load_file(tmp_path / "out" / name / "model.safetensors") for name in ("whole", "text")]
    assert {name for name in results[0] if not name.startswith("model.visual.")} == results[1].keys()
    assert all(torch.equal(tensor, results[0][name]) for name, tensor in results[1].items())
    with pytest.raises(ValueError, match=r"no weights for model\.visual\.patch_embed.* and 1 others"):
        find_checkpoint(half)


def test_what_the_class_does_not_ask_for(whole, tmp_path, monkeypatch):
    """transformers' own list of keys that may be missing holds here, too."""
    source = without(whole, tmp_path / "source", "model.norm.weight")
    monkeypatch.setattr(type(make_model("deepseek_v3")), "_keys_to_ignore_on_load_missing", [r"model\.norm\."])
    assert find_checkpoint(source).reader is not None


def test_one_tensor_for_several_parameters(tmp_path):
    """A stored tensor that transformers cuts into pieces fills them all."""
    make_family("kimi_k25").save_pretrained(tmp_path / "whole")
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    (fused,) = (name for name in stored if name.endswith("0.wqkv.weight"))
    assert find_checkpoint(tmp_path / "whole").reader is not None
    with pytest.raises(ValueError, match=r"no weights for .*q_proj\.weight and 2 others"):
        find_checkpoint(without(tmp_path / "whole", tmp_path / "part", fused))
