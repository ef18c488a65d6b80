"""Checks of an output folder: files already in it, some of which programs would load instead of the result."""

import re
import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path

from ...data.files import listed
from .manifest import only_process


__all__ = ["WORK_NAME", "check_no_foreign", "check_output", "prepare_output", "set_card_aside"]

logger = getLogger(__name__)
WORK_NAME = ".dern"  # working folder of an unfinished run inside its output folder
CARD_NAME = "README.md"
OURS = re.compile(r"\A---\n.*?^- dern$.*?^---$", re.DOTALL | re.MULTILINE)  # the tag that our cards have
# Files of other formats, adapters and quantisations.
FOREIGN = (
    "adapter_config.json",
    "adapter_model*",
    "*.gguf",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "consolidated*.pth",
    "params.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)
REPLACED = ("model*.safetensors", "model*.safetensors.index.json", "dern_statistics.safetensors")


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written to; nothing is read or written.

    Args:
        source: folder of the checkpoint that is to be compressed; it may be a Hub id instead.
        output: folder, which need not exist.
        overwrite: allow other files in it; those of an unfinished run always may be there.

    Raises:
        ValueError: a file, the source itself, or a folder with other files.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder for the compressed checkpoint")
    if source.exists() and output.resolve() == source.resolve():
        raise ValueError("source and output are the same folder; the source would be lost, choose another output")
    if output.is_dir() and any(output.iterdir()) and not (overwrite or (output / WORK_NAME).is_dir()):
        raise ValueError(f"{output} is not empty; choose another folder or add --overwrite (overwrite=True)")


def prepare_output(source: Path, output: Path, restart: bool, overwrite: bool, names: Sequence[str]) -> None:
    """Check an output folder, and discard an unfinished run in it if asked to.

    Args:
        source: folder of the checkpoint to compress.
        output: folder, which need not exist.
        restart: discard an unfinished run.
        overwrite: allow other files in it, but none that programs would load instead of the result.
        names: of the results' folders in it.

    Raises:
        ValueError: it is a file, the source itself, or a folder with other files.
        RuntimeError: another process is writing to it.
    """
    check_output(source, output, overwrite or restart)
    work = output / WORK_NAME
    if work.is_dir() and restart:
        with only_process(work):
            shutil.rmtree(work)
    check_output(source, output, overwrite)
    check_no_foreign(output / name for name in names)


def check_no_foreign(folders: Iterable[Path]) -> None:
    """Refuse output folders with files of another kind of checkpoint, which are never deleted.

    Args:
        folders: output folders, which need not exist.

    Raises:
        ValueError: there are such files; the message names them.
    """
    for folder in folders:
        names = sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
        found = [name for name in names if _matches(name, FOREIGN) and not _matches(name, REPLACED)]
        if found:
            raise ValueError(
                f"{folder} holds files of another checkpoint that programs would load instead of the result, or with "
                f"it: {listed(found)}; they are not deleted: move them away, or choose another folder"
            )


def set_card_aside(folder: Path) -> None:
    """Rename a README.md that is not the card of a compressed checkpoint, so that the result can have its own."""
    card = folder / CARD_NAME
    if not card.is_file() or OURS.search(card.read_text("utf-8", errors="replace")):
        return
    names = (f"README.old{number or ''}.md" for number in range(1000))
    aside = next(path for name in names if not (path := folder / name).exists())
    card.rename(aside)
    logger.warning("%s is not of a compressed checkpoint; it is kept as %s", card, aside.name)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
