"""The files of a checkpoint beside its weights and config: tokenizer, generation config, chat templates, own code.

Only files that are known to belong to a checkpoint are copied: programs also read others that lie in people's folders
(adapters, other quantisations, trainer states), and would then load something else than the result.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from ...text_files import replace_by_copy


__all__ = ["FOLDERS", "TOKENIZER", "companions", "copy_companions", "left_out", "remove_stale"]

FOLDERS = ("additional_chat_templates",)
# Patterns for lower-case names.  Files of tokenizers and processors, of any class in transformers or of custom code:
PREPROCESSING = (
    "*token*.json",
    "*vocab*.json",
    "*processor*.json",
    "*feature_extractor*.json",
    "tekken*.json",
    "emoji.json",
    "chat_template*",
    "*.jinja",
    "*.model",
    "tokenizer.model*",
    "*.tiktoken",
    "*.bpe",
    "*.codes",
    "*vocab*.txt",
    "merges.txt",
)
GENERATION = "generation_config.json"
OTHERS = (GENERATION, "*.py", "*.md", "*.txt", "licen[cs]e*", "copying*", "notice*")
OWN = ("config.json", "readme.md", "dern_*", "assets/", "model*.safetensors", "model*.safetensors.index.json")
# Files of an earlier checkpoint in the same folder, removed because they would be read with the new one.
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
STALE = (
    *TOKENIZER,
    "tokenizer.model.v*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*.jinja",
)


def copy_companions(source: Path, target: Path, keep: bool = False, inputs_only: bool = False) -> None:
    """Copy the files that a checkpoint needs beside its weights and its config.

    Args:
        source: folder of the original; weights, indexes, its card and unknown files are not copied.
        target: folder to copy to.
        keep: do not replace files that the target has already.
        inputs_only: copy only tokenizer, processor and code files.
    """
    for name in companions(source, inputs_only):
        if not (keep and (target / name).exists()):
            (target / name).parent.mkdir(exist_ok=True)
            replace_by_copy(target / name, source / name)


def companions(source: Path, inputs_only: bool = False) -> list[str]:
    """List the files that `copy_companions` copies, relative to the folder."""
    names = [file.name for file in source.iterdir() if file.is_file() and is_companion(file.name)]
    if inputs_only:
        names = [name for name in names if _matches(name, (*PREPROCESSING, "*.py"))]
    return names + [f"{name}/{file.name}" for name in FOLDERS for file in source.glob(f"{name}/*") if file.is_file()]


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint beside its weights, config and card."""
    return _matches(name, (*PREPROCESSING, *OTHERS)) and not _matches(name, (*OWN, ".*"))


def left_out(source: Path) -> list[str]:
    """List the files and folders in a checkpoint's folder that are not copied because their names are unknown."""
    entries = sorted(source.iterdir())
    files = [entry.name for entry in entries if entry.is_file() and not is_companion(entry.name)]
    folders = [f"{entry.name}/" for entry in entries if entry.is_dir() and entry.name not in FOLDERS]
    return [name for name in [*files, *folders] if not _matches(name, (*OWN, ".*"))]


def remove_stale(folder: Path, written: Collection[str]) -> None:
    """Remove files of an earlier checkpoint in the same folder that would be read together with the new one.

    Args:
        folder: of the new checkpoint.
        written: its files, relative to the folder; without a tokenizer among them, an existing one is kept.
    """
    files = [file for pattern in ("*", "*/*.jinja") for file in folder.glob(pattern) if file.is_file()]
    names = {file.relative_to(folder).as_posix() for file in files}
    patterns = (*STALE, GENERATION) if not set(TOKENIZER).isdisjoint(written) else (GENERATION,)
    for name in names - set(written):
        if _matches(name, patterns):
            (folder / name).unlink()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
