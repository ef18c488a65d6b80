"""Checkpoints that somebody has broken or made to do harm: one line that says so before any long work, or read right.

`test_hostile_files.py` has the files one by one; here the commands meet them, in a whole checkpoint.
"""

import json
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, random_tokens, tiny_tokenizer

from optimum_dern import DernCompressor
from optimum_dern.commands.main import main
from optimum_dern.data.batches import load_batches
from optimum_dern.errors import is_deliberate


HUGE = 1 << 62
CONFIG = {  # values of config.json that no model of these weights has
    "vocab_size": (0, -1, HUGE, 500, "300", None, [300]),
    "hidden_size": (0, -1, HUGE, 1 << 70, 64, 1.5, True),
    "intermediate_size": (0, -1, HUGE, 8),
    "num_hidden_layers": (0, -1, 3, 1 << 20, HUGE, "2"),
    "num_attention_heads": (0, -1, 7, HUGE),
    "num_key_value_heads": (0, -1, 4),
    "head_dim": (-1, 16, 1 << 31),
    "num_local_experts": (0, 1, -1, 7, 9, 1 << 20, HUGE, None, "8"),
    "num_experts_per_tok": (0, -1, 9, HUGE, "2"),
    "rms_norm_eps": ("x", None),
    "hidden_act": ("no_such_function", 5),
    "dtype": ("int8", "no_such_dtype", 7),
    "rope_parameters": ({"rope_type": "no_such_type"}, 5),
    "architectures": (["MixtralModel"],),
    "layer_types": (5, ["no_such_type"]),
    "text_config": (5, "x", []),
    "quantization_config": (5, "x", [1], {"quant_method": "no_such_method"}, {"quant_method": ["fp8"]}),
    "auto_map": (5,),
    "model_type": ("no_such_model", 5, "own"),
    "transformers_weights": ("../model.safetensors", "/etc/passwd", "no_such_file.safetensors", 5),
}
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
ROUTER, ATTENTION = "model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.self_attn.q_proj.weight"
WEIGHTS = {  # what is done to the tensors, and a part of the message
    "no expert": (lambda t: t.pop(EXPERT), "is missing"),
    "an expert more": (lambda t: t.update({EXPERT.replace("experts.3", "experts.8"): t[EXPERT]}), "more than the 8"),
    "no router": (lambda t: t.pop(ROUTER), "has no weights for"),
    "nothing": (lambda t: t.clear(), "has no weights for"),
    "turned": (lambda t: t.update({ATTENTION: t[ATTENTION][:, :7]}), r"with the shape \(32, 7\)"),
    "short": (lambda t: t.update({ROUTER: t[ROUTER][:5]}), r"with the shape \(5, 32\)"),
    "scalar": (lambda t: t.update({EXPERT: torch.tensor(1.0)}), r"has the shape \(\)"),
    "whole numbers": (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), "as I8, and weights are"),
    "complex": (lambda t: t.update({ATTENTION: t[ATTENTION].to(torch.complex64)}), "as C64, and weights are"),
    "NaN": (lambda t: t[EXPERT].fill_(torch.nan), "contain NaN or infinity"),
    "infinity": (lambda t: t[EXPERT].fill_(torch.inf), "contain NaN or infinity"),
    "NaN in a router": (lambda t: t[ROUTER].fill_(torch.nan), "contain NaN or infinity"),
    "NaN in attention": (lambda t: t[ATTENTION].fill_(torch.nan), "contain NaN or infinity"),
}
TOKENIZERS = {
    "tokenizer.json": (
        b"",
        b"[]",
        b"5",
        b"[" * 100_000,
        "{}".encode("utf-16"),
        b'{"model": {"type": "no_such_type"}}',
    ),
    "tokenizer_config.json": (b"", b"[]", b'{"tokenizer_class": 5}', b'{"eos_token": 5}', b'{"a":' * 100_000),
}


class Evil:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "text.txt").write_text("some words to write down\n" * 40, "utf-8")
    return tmp_path


def refused(folder, *arguments, capsys=None):
    """The line of a command that must fail with exit code 2, import nothing of the model, and leave nothing."""
    before, modules = sorted(folder.rglob("*")), set(sys.modules)
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("optimum-dern: error: ")]
    assert error.value.code == 2 and len(lines) == 1
    assert "--traceback shows where" not in lines[0], lines[0]
    assert sorted(folder.rglob("*")) == before
    assert not {name for name in set(sys.modules) - modules if name.startswith(("own", "transformers_modules"))}
    return lines[0]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONFIG.items() for value in values])
def test_configs(key, value, folder, capsys):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(folder, "compress", folder / "model", folder / "out", "--dataset", folder / "text.txt", capsys=capsys)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, folder, capsys):
    change, message = WEIGHTS[name]
    tensors = load_file(folder / "model" / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.tmp")
    os.replace(folder / "model.tmp", folder / "model" / "model.safetensors")
    compressor = DernCompressor(num_experts=4, preset="fast", dataset=random_tokens(), self_share=0)
    with pytest.raises(ValueError, match=message) as error:
        compressor.compress_checkpoint(folder / "model", folder / "out")
    assert is_deliberate(error.value)
    late = "NaN" in name or name == "infinity"  # found when the layer is read; the first one is then finished
    assert late or not (folder / "out").exists()


@pytest.mark.parametrize(("name", "content"), [(name, c) for name, contents in TOKENIZERS.items() for c in contents])
def test_tokenizers(name, content, folder, capsys):
    (folder / "model" / name).write_bytes(content)
    line = refused(
        folder, "compress", folder / "model", folder / "out", "--dataset", folder / "text.txt", capsys=capsys
    )
    assert "the tokenizer of" in line


@pytest.mark.parametrize("command", ["compress", "evaluate", "inspect"])
def test_pickles_stay_closed(command, folder, capsys):
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder / "ran")))
    output = {"compress": [folder / "out"], "evaluate": ["--data", folder / "text.txt"], "inspect": []}[command]
    if command == "inspect":  # reads no weights
        main([command, str(folder / "model")])
    elif command == "compress":
        assert "pickled weights" in refused(folder, command, folder / "model", *output, capsys=capsys)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kind", ["bare", "torch"])
def test_pickled_data(kind, tmp_path):
    path = tmp_path / "rows.pt"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran"))) if kind == "bare" else torch.save(
        Evil(tmp_path / "ran"), path
    )
    with pytest.raises(ValueError, match="holds no tensors.*code in it never runs"):
        load_batches(path, None)
    assert not (tmp_path / "ran").exists()


def test_own_code_needs_consent(folder, capsys):
    path = folder / "model" / "config.json"
    own = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    for arguments in (["inspect", folder / "model"], ["evaluate", folder / "model", "--data", folder / "text.txt"]):
        assert "trust_remote_code" in refused(folder, *arguments, capsys=capsys)
    path.write_text(json.dumps(json.loads(path.read_text()) | own | {"model_type": "mixtral"}))
    main(["inspect", str(folder / "model")])  # a family that transformers knows: its own code is left alone
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("where", ["shard", "folder"])
def test_links(where, folder):
    """Links are followed, as the Hub's cache is made of them, and what they lead to is only read."""
    real = folder / "real"
    if where == "shard":
        os.replace(folder / "model" / "model.safetensors", real)
        (folder / "model" / "model.safetensors").symlink_to(real)
    else:
        os.replace(folder / "model", real)
        (folder / "model").symlink_to(real)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    compressor = DernCompressor(num_experts=4, preset="fast", dataset=random_tokens(), self_share=0)
    compressor.compress_checkpoint(folder / "model", folder / "out")
    assert {path: path.read_bytes() for path in files} == before
    assert not any(path.is_symlink() for path in (folder / "out").rglob("*"))
