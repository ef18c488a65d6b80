"""Checkpoints saved through a wrapper: the refusal names it, and its mend works."""

import re

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_model, random_tokens

from optimum_dern import DernCompressor


FIELDS = {"num_experts": 4, "dataset": random_tokens(), "method": "prune", "preset": "paper", "batch_size": 4}
WRAPPED = {  # pattern and replacement of every name, and what the message says of it
    "torch.compile": (r"^", "_orig_mod.", "with '_orig_mod.' in its name, as torch.compile leaves it"),
    "each layer": (r"(layers\.\d+\.)", r"\1_orig_mod.", "with '_orig_mod.' in its name, as torch.compile leaves it"),
    "DataParallel": (r"^", "module.", "with 'module.' in its name, as DataParallel or DeepSpeed leaves it"),
    "both": (r"^", "module._orig_mod.", "with '_orig_mod.' and 'module.' in its name"),
    "FSDP": (r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", "as FSDP leaves it"),
    "unknown": (r"^", "student.", "with 'student.' in its name, which no model of transformers has"),
}


def save(folder, pattern, replacement):
    """A checkpoint with other names."""
    make_model("mixtral").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers(kind, tmp_path):
    """What was found, and code that mends it; doing as it says gives a checkpoint that is compressed."""
    pattern, replacement, found = WRAPPED[kind]
    source = save(tmp_path / "source", pattern, replacement)
    with pytest.raises(ValueError, match="would leave weights random") as error:
        DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
    assert found in str(error.value) and "Load it with" not in str(error.value)
    command = re.search(r"save_file\(.*\}\)", str(error.value)).group()
    exec(command, {"save_file": save_file, "load_file": load_file, "FILE": source / "model.safetensors"})
    report = DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
    assert report.after.experts == 4


@pytest.mark.parametrize(
    ("pattern", "replacement"), [(r"^", "base_model.model."), (r"(experts.*)weight", r"\1base_layer.weight")]
)
def test_adapters(pattern, replacement, tmp_path):
    """Weights beside adapters of PEFT are merged, not renamed."""
    source = save(tmp_path / "source", pattern, replacement)
    with pytest.raises(ValueError, match=r"as PEFT leaves it.*what model.merge_and_unload\(\) returns"):
        DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")


def test_another_layout(tmp_path):
    """Where no wrapper explains it, what is missing is named, as transformers would initialise it anew."""
    source = save(tmp_path / "source", r"experts", "specialists")
    with pytest.raises(ValueError, match="no weights for .*experts.* initialised anew: the checkpoint is incomplete"):
        DernCompressor(**FIELDS).compress_checkpoint(source, tmp_path / "out")
