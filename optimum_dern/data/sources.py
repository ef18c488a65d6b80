"""Names of data: which are paths, which are datasets that the library `datasets` reads, and which are neither.

owner/name                  a dataset on the Hub, its split "train", read as a stream
owner/name:config           one of its configurations; "train", "validation" and "test" here name a split
owner/name:config:split     both; `owner/name::split` for the split alone
folder                      one that `save_to_disk` wrote, or a clone of a Hub dataset: likewise
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..paths import check_utf8
from .chat import holds_messages
from .files import COMPRESSIONS, FILE_TYPES, file_type


__all__ = [
    "MADE",
    "NAMED_DATASETS",
    "RANDOM",
    "SELF",
    "Repository",
    "check_source",
    "find_repository",
    "holds_text",
    "is_endless",
    "is_stream",
    "open_repository",
]

NAMED_DATASETS = ("wikitext2", "c4", "c4-new", "general")
SELF, RANDOM = MADE = ("self", "random")  # written by the model itself, and random token ids
SPLITS = ("train", "validation", "test")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
OTHER_FILES = (".arrow", ".csv", ".md", ".tsv", *FILE_TYPES, *COMPRESSIONS)


class Repository(NamedTuple):
    """A dataset that `datasets` reads."""

    name: str  # Hub id or folder
    config: str | None = None
    split: str = "train"

    @property
    def folder(self) -> Path | None:
        """The local folder; None on the Hub."""
        folder = Path(self.name).expanduser()
        return folder if folder.is_dir() else None


def check_source(name: str | Path) -> Path:
    """Return the path of a data source, after checking that it exists or is the name of something else.

    Raises:
        FileNotFoundError: it is neither a path nor a name of a dataset.
        ValueError: its name is not UTF-8.
    """
    check_utf8(name)
    if not str(name).strip():
        raise ValueError("the name of the data is empty; give a file, a folder or a dataset, or leave it out")
    path = Path(name).expanduser()
    if str(name) not in NAMED_DATASETS + MADE and not path.exists() and find_repository(name) is None:
        raise FileNotFoundError(
            f"calibration data {str(name)!r} is neither a file, a folder nor one of {NAMED_DATASETS + MADE}, nor a "
            "Hub dataset of the form owner/name, owner/name:config or owner/name:config:split; give one of these"
        )
    return path


def holds_text(dataset: Any) -> bool:
    """Return whether a dataset needs a tokenizer, by its form and first row; files except .pt count as text."""
    if isinstance(dataset, Mapping):
        return any(map(holds_text, dataset))
    if isinstance(dataset, str | Path):
        return str(dataset) not in MADE and file_type(Path(dataset)) != ".pt"
    row = next(iter(dataset), None) if hasattr(dataset, "__iter__") else None
    return isinstance(row, str) or (isinstance(row, Mapping) and "input_ids" not in row) or holds_messages(row)


def is_stream(dataset: Any) -> bool:
    """Return whether data is a `datasets.IterableDataset`, which is read as far as needed only."""
    return not hasattr(dataset, "__len__") and hasattr(dataset, "shuffle") and hasattr(dataset, "take")


def is_endless(dataset: Any) -> bool:
    """Return whether data has no end that one could wait for: a stream, a dataset on the Hub, a named one."""
    if isinstance(dataset, Mapping):
        return any(map(is_endless, dataset))
    if not isinstance(dataset, str | Path):
        return is_stream(dataset)
    repository = find_repository(dataset)
    return str(dataset) in NAMED_DATASETS + MADE or (repository is not None and repository.folder is None)


def find_repository(source: str | Path) -> Repository | None:
    """Interpret the name of a dataset that `datasets` reads; None for other files and folders.

    Args:
        source: of the form in this module's table.
    """
    path = Path(source).expanduser()
    if path.exists():
        return Repository(str(path)) if path.is_dir() and (_is_saved(path) or _is_clone(path)) else None
    name, _, rest = str(source).partition(":")
    on_hub = HUB_ID.fullmatch(name) and Path(name).suffix.lower() not in OTHER_FILES
    if not on_hub and not (rest and Path(name).expanduser().is_dir()):
        return None
    config, _, split = rest.partition(":")
    if config in SPLITS and not split:
        return Repository(name, split=config)
    return Repository(name, config or None, split or "train")


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _is_clone(folder: Path) -> bool:
    """Return whether a folder is laid out as a Hub dataset: split by names or by its card, not just some files."""
    files = [file.name.lower() for file in folder.iterdir() if file_type(file)]
    if any(map(SHARD.search, files)):
        return True
    inner = folder / "data"
    if not files and inner.is_dir():
        return any(map(file_type, inner.iterdir()))
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return False
    header = text.split("\n---", 1)[0]
    return bool(re.search(r"^(configs|dataset_info):", header, re.MULTILINE)) or any(
        re.match(rf"({'|'.join(SPLITS)})\b", name) for name in files
    )


def open_repository(repository: Repository) -> Any:
    """Open a dataset by the library `datasets`: a saved one as it is, all others as a stream, which copies nothing.

    Raises:
        ValueError: there is no such configuration or split.
        FileNotFoundError: the Hub has no such dataset.
        ConnectionError: the Hub cannot be reached.
    """
    from datasets import load_dataset

    folder, config = repository.folder, repository.config
    if folder and _is_saved(folder):
        return _open_saved(repository)
    try:
        return load_dataset(str(folder or repository.name), config, split=repository.split, streaming=True)
    except ValueError as error:
        raise ValueError(
            f"the dataset {repository.name!r}: {error}. Name a configuration and a split as "
            f"{repository.name}:config:split"
        ) from error
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        raise kind(
            f"{repository.name!r} is neither a file nor a folder here, and the Hub does not give it: {error}"
        ) from error


def _open_saved(repository: Repository) -> Any:
    from datasets import load_from_disk

    found = load_from_disk(str(repository.folder))
    if not isinstance(found, Mapping):
        return found
    if repository.split in found:
        return found[repository.split]
    names = ", ".join(map(repr, found))
    raise ValueError(
        f"the folder {repository.name} has the splits {names} but no {repository.split!r}; name one as "
        f"{repository.name}::{next(iter(found), 'train')}"
    )
