"""Files of other checkpoints in an output folder, which programs would load instead of the result or with it."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path

from ...data.files import listed


__all__ = ["check_no_foreign", "set_card_aside"]

logger = getLogger(__name__)
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
