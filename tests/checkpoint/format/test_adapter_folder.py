"""An adapter given as MODEL: what it is, and how it becomes a model."""

import json

import pytest
from tiny import make_model, random_tokens

from optimum_dern import DernCompressor
from optimum_dern.checkpoint.source.resolve import check_checkpoint
from optimum_dern.commands.main import main


MESSAGE = r"is an adapter of me/base without the weights.*merge it into its base first.*\.merge_and_unload\(\)"


def save_adapter(folder, *names):
    """The files of an adapter, and others."""
    folder.mkdir()
    for name in ("adapter_model.safetensors", "README.md", *names):
        (folder / name).write_text("{}", "utf-8")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "me/base"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter), "utf-8")
    return folder


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter(weights, tmp_path, capsys):
    """Refused by every command, also where a trainer has put the base's config beside it."""
    folder = save_adapter(tmp_path / "adapter", weights)
    for job in (["inspect"], ["compress", str(tmp_path / "out")], ["evaluate", "--data", str(tmp_path)]):
        with pytest.raises(SystemExit):
            main([job[0], str(folder), *job[1:], *(["--dataset", str(tmp_path)] if job[0] == "compress" else [])])
        assert "merge it into its base first" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=MESSAGE):
        check_checkpoint(folder)
    make_model("mixtral").config.save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=MESSAGE):
        DernCompressor(num_experts=4, dataset=random_tokens()).compress_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_beside_it(tmp_path):
    """Of a whole model: they are what is in the way."""
    folder = save_adapter(tmp_path / "adapter", "pytorch_model.bin")
    make_model("mixtral").config.save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="holds pickled weights"):
        DernCompressor(num_experts=4, dataset=random_tokens()).compress_checkpoint(folder, tmp_path / "out")
