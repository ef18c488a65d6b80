"""A head that the config ties to the embeddings, and that the checkpoint stores all the same, or alone."""

import json

import pytest
import torch
from families import FAMILIES
from families import make_model as make_family
from safetensors.torch import load_file, save_file
from tiny import compress, make_model, padded_batch, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.format import tensor_file
from optimum_dern.checkpoint.format.tensor_file import equal_values, read_header
from optimum_dern.checkpoint.source.find import find_checkpoint
from optimum_dern.evaluation.loss.streamed import StreamedCheckpoint
from optimum_dern.models.loading import load_model
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.size import measure_model


QUICK = {"num_experts": 4, "batch_size": 4, "neuron_refit": False, "router_refit": False}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = {  # how the head is stored -> whether it is the embeddings
    "own": False,
    "equal": True,
    "equal in bfloat16": True,  # which is what the model is loaded in
    "alone": True,
    "not": True,
}


def write(folder, stored, dtype=torch.float32):
    """A checkpoint whose config ties the head."""
    make_model("mixtral").to(dtype).save_pretrained(folder)
    change(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    if stored == "equal":
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
    elif stored == "equal in bfloat16":
        tensors[EMBEDDINGS] = tensors[HEAD].float() * (1 + 2**-12)  # rounded away
    elif stored != "own":
        del tensors[EMBEDDINGS if stored == "alone" else HEAD]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change(folder, **values):
    """Write values into a config.json; those of nested configs as dicts."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    for key, value in values.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config), "utf-8")


@torch.no_grad()
def logits(folder):
    """Of the loaded model and of the streamed one; equal."""
    batch = padded_batch([12, 9], "right")
    loaded = load_model(str(folder), "cpu")(**batch).logits
    (streamed,) = StreamedCheckpoint(folder, torch.device("cpu")).stream_logits([batch])
    torch.testing.assert_close(streamed, loaded, atol=1e-5, rtol=1e-5)
    return loaded


def check_compressed(source, folder):
    """From disk and from memory: one result, and plain transformers has its head; the config of the first."""
    DernCompressor(dataset=random_tokens(), **QUICK).compress_checkpoint(source, folder / "disk")
    model = load_model(str(source), "cpu")
    compress(model, **QUICK).save(model, folder / "memory")
    assert torch.equal(logits(folder / "disk"), logits(folder / "memory"))
    with torch.no_grad():
        assert torch.equal(logits(folder / "memory"), model(**padded_batch([12, 9], "right")).logits)
    configs = [json.loads((folder / name / "config.json").read_text("utf-8")) for name in ("disk", "memory")]
    assert configs[0] == configs[1]
    return configs[0]


@pytest.mark.parametrize("stored", STORED)
def test_as_transformers_loads_it(stored, tmp_path):
    """Logits, sizes and what is written are those of the loaded model; the config says what the weights say."""
    source = tmp_path / "source"
    write(source, stored, torch.bfloat16 if stored == "equal in bfloat16" else torch.float32)
    logits(source)
    model, skeleton = load_model(str(source), "cpu"), find_checkpoint(source, need_weights=False).skeleton
    assert measure_model(skeleton, find_moe_layers(skeleton)) == measure_model(model, find_moe_layers(model))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is STORED[stored]
    assert check_compressed(source, tmp_path)["tie_word_embeddings"] is STORED[stored]


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, True)])
def test_nested_configs_that_disagree(outer, inner, tmp_path):
    """A head of its own stays the model's own, and no part of the written config ties it."""
    source, nested = tmp_path / "source", FAMILIES["qwen3_vl_moe"].nested
    make_family("qwen3_vl_moe").save_pretrained(source)
    change(source, tie_word_embeddings=outer, **{nested: {"tie_word_embeddings": inner}})
    config = check_compressed(source, tmp_path)
    assert (config["tie_word_embeddings"], config[nested]["tie_word_embeddings"]) == (False, False)


def test_nested_configs_without_a_head(tmp_path):
    """The outer config decides: the embeddings are the head, and the configs stay as they are."""
    source, nested = tmp_path / "source", FAMILIES["qwen3_vl_moe"].nested
    make_family("qwen3_vl_moe").save_pretrained(source)
    change(source, tie_word_embeddings=True, **{nested: {"tie_word_embeddings": False}})
    tensors = load_file(source / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = check_compressed(source, tmp_path)
    assert (config["tie_word_embeddings"], config[nested]["tie_word_embeddings"]) == (True, False)


def test_values_are_compared_in_pieces(tmp_path, monkeypatch):
    """Of any size, up to the last number, in a dtype."""
    monkeypatch.setattr(tensor_file, "PIECE", 4)
    first = torch.arange(10.0)
    tensors = {"a": first, "b": first.bfloat16(), "c": first + torch.eye(10)[9], "d": first.view(2, 5).clone()}
    save_file(tensors, tmp_path / "file")
    infos = read_header(tmp_path / "file")
    assert equal_values(infos["a"], infos["b"], torch.float32)
    assert not any(equal_values(infos["a"], infos[name], torch.float32) for name in "cd")
    assert equal_values(infos["a"], infos["c"], torch.bool)
