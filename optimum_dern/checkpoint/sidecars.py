"""The files beside the weights that a checkpoint brings along: tokenizer, generation config, templates, own code."""

import shutil
from pathlib import Path


__all__ = ["copy_companions"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz")
OWN = ("config.json", "README.md", "dern_config.json", "dern_report.json", "dern_report.html", "dern_manifest.json")
FOLDERS = ("additional_chat_templates",)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a checkpoint needs beside its weights and its config.

    Args:
        source: folder of the original; weights, indexes and its card stay behind.
        target: folder.
    """
    for file in source.iterdir():
        is_index = file.name.endswith(".index.json")
        if file.is_file() and not (
            file.name.startswith(".") or file.suffix in WEIGHTS or file.name in OWN or is_index
        ):
            shutil.copyfile(file, target / file.name)
    for name in FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
