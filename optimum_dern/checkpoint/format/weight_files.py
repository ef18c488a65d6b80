"""The weight files of a checkpoint's folder: those that transformers would load, and no others.

A folder can have several sets of weights: a single file beside the index and the shards of an earlier upload, files
that no index names, variants.  All code that reads, counts or downloads weights finds them with this module.
"""

import json
from pathlib import Path

from .adapter_folder import check_whole_model


__all__ = ["INDEX_NAME", "SINGLE_NAME", "entry_names", "has_weights", "weight_files", "weight_names"]

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth")


def entry_names(folder: Path) -> tuple[str, ...]:
    """List the files that transformers looks for, a single weight file or an index; the first that exists is used.

    Args:
        folder: with a config.json, which may name another file.
    """
    config = folder / "config.json"
    named = json.loads(config.read_text("utf-8")).get("transformers_weights") if config.is_file() else None
    return (named,) if named else (SINGLE_NAME, INDEX_NAME)


def weight_names(folder: Path) -> list[str]:
    """List the names of the weight files, present or not; empty without a safetensors file or an index."""
    entry = next((name for name in entry_names(folder) if (folder / name).is_file()), None)
    if entry is None:
        return []
    if not entry.endswith(".json"):
        return [entry]
    return sorted(set(json.loads((folder / entry).read_text("utf-8"))["weight_map"].values()))


def has_weights(folder: Path) -> bool:
    """Whether all weight files exist in a folder."""
    names = weight_names(folder)
    return bool(names) and all((folder / name).is_file() for name in names)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint, all of which must exist.

    Raises:
        FileNotFoundError: there are none, or some are missing.
    """
    names = weight_names(folder)
    if not names and not any(folder.glob("pytorch_model.bin*")):
        check_whole_model(folder, folder)
    if not names and any(any(folder.glob(pattern)) for pattern in PICKLED):
        raise FileNotFoundError(
            f"{folder} holds pickled weights, which can run code when they are loaded; convert them once, with "
            "transformers: AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"
        )
    if not names:
        entries = entry_names(folder)
        found = f"neither {' nor '.join(entries)}" if len(entries) > 1 else f"no {entries[0]}, which its config names"
        raise FileNotFoundError(f"{folder} has {found}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of its {len(names)} shards, such as {missing[0]}")
    return [folder / name for name in names]
