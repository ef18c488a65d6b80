"""The weight files of a checkpoint's folder: those that transformers would load, and no others.

A folder can have several sets of weights: a single file beside the index and the shards of an earlier upload, files
that no index names, variants.  All code that reads, counts or downloads weights finds them with this module.
"""

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from ...text_files import read_object, replace_json


__all__ = [
    "ADAPTER_NAME",
    "INDEX_NAME",
    "PICKLED",
    "SINGLE_NAME",
    "check_whole_model",
    "entry_names",
    "has_weights",
    "no_weights",
    "weight_files",
    "weight_names",
    "write_index",
]

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
ADAPTER_NAME = "adapter_config.json"
LONGEST_NAME = 255  # as long as file systems have them
PICKLED = (".bin", ".pt", ".pth")


def entry_names(folder: Path) -> tuple[str, ...]:
    """List the files that transformers looks for, a single weight file or an index; the first that exists is used.

    Args:
        folder: with a config.json, which may name another file.
    """
    config = folder / "config.json"
    named = read_object(config).get("transformers_weights") if config.is_file() else None
    return (_inside(named, config.name),) if named else (SINGLE_NAME, INDEX_NAME)


def weight_names(folder: Path) -> list[str]:
    """List the names of the weight files, present or not; empty without a safetensors file or an index."""
    entry = next((name for name in entry_names(folder) if (folder / name).is_file()), None)
    if entry is None:
        return []
    if not entry.endswith(".json"):
        return [entry]
    files = read_object(folder / entry).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{entry} has no weight_map from tensors to files; download it again")
    return sorted({_inside(name, entry) for name in files.values()})


def _inside(name: object, source: str) -> str:
    """Return the name of a weight file, which must be in the checkpoint's folder.

    Raises:
        ValueError: it is no name, or leads elsewhere.
    """
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or "\0" in name:
        raise ValueError(f"{source} names {name!r:.80} as a weight file; download it again")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(
            f"{source} names the weight file {name!r}, which is outside of the checkpoint's folder; download it again"
        )
    return name


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
    if not names:
        raise no_weights(folder, folder, [file.name for file in folder.iterdir()], "FOLDER")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of its {len(names)} shards, such as {missing[0]}; download it again"
        )
    return [folder / name for name in names]


def write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    """Write the index of a checkpoint's shards.

    Args:
        folder: of the checkpoint.
        files: file name of each tensor.
        total: bytes of all tensors.
    """
    names = dict(sorted(files.items()))
    replace_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": names})


def no_weights(model: str | Path, folder: Path, files: Collection[str], source: str) -> FileNotFoundError:
    """Make the error for a checkpoint without safetensors weights, which says what is there instead.

    Args:
        model: as the user gave it.
        folder: local, with its config.
        files: names of all files of the checkpoint.
        source: the arguments with which `from_pretrained` loads it.

    Raises:
        FileNotFoundError: it is an adapter.
    """
    if not any(name.startswith("pytorch_model.bin") for name in files):
        check_whole_model(model, folder)
    if any(name.endswith(PICKLED) for name in files):
        return FileNotFoundError(
            f"{model} holds pickled weights, which can run code when they are loaded; convert them once, with "
            f"transformers: AutoModelForCausalLM.from_pretrained({source}, dtype='auto').save_pretrained(NEW_FOLDER), "
            "and give that folder"
        )
    entries = entry_names(folder)
    found = f"neither {' nor '.join(entries)}" if len(entries) > 1 else f"no {entries[0]}, which its config names"
    return FileNotFoundError(f"{model} has {found}; give the checkpoint in safetensors")


def check_whole_model(model: str | Path, folder: Path) -> None:
    """Refuse a folder that holds an adapter where a whole model is expected.

    Args:
        model: as the user gave it.
        folder: with its files, among which no weights of a whole model were found.

    Raises:
        FileNotFoundError: the folder has an adapter's config.
    """
    path = folder / ADAPTER_NAME
    if not path.is_file():
        return
    base = read_object(path).get("base_model_name_or_path") or "its base"
    raise FileNotFoundError(
        f"{model} is an adapter of {base} without the weights of a whole model; merge it into its base first, and "
        f"give the new folder: AutoPeftModelForCausalLM.from_pretrained({str(model)!r}).merge_and_unload()"
        ".save_pretrained(NEW_FOLDER), of peft (the tokenizer goes there, too)"
    )
