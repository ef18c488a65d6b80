"""Read data files (text, JSON, Parquet, tensors), with errors that name the file and line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..paths import check_utf8


__all__ = ["FILE_TYPES", "data_files", "listed", "parse_json", "read_rows", "read_text", "skipped_names"]

FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet", ".pt")


def data_files(folder: Path) -> list[Path]:
    """List the data files of a folder, sorted by name.

    Raises:
        ValueError: no data file, or a name that is not UTF-8.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in FILE_TYPES)
    if not files:
        there = listed(skipped_names(folder)) or "nothing"
        raise ValueError(f"the folder {folder} has no data file ({', '.join(FILE_TYPES)}); it holds {there}")
    check_utf8(*files)  # a text is named after its file
    return files


def listed(names: Sequence[str], most: int = 5) -> str:
    """Join the first names into a text, with the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def skipped_names(folder: Path) -> list[str]:
    """List the entries of a folder that are not data files."""
    others = sorted(entry for entry in folder.iterdir() if entry.suffix not in FILE_TYPES)
    return [f"{entry.name}/" if entry.is_dir() else entry.name for entry in others]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 text ({error.reason}); convert the file") from error


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """Parse JSON text that starts at a line of a file.

    Raises:
        ValueError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}"
        raise ValueError(f"{place} is not JSON ({error.msg}, column {error.colno}); mend the line") from error


def read_rows(path: Path) -> Any:
    """Read the rows of a data file other than plain text, one per sequence.

    Raises:
        ValueError: an unsupported file type or content.
    """
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        return [parse_json(line, path, number) for number, line in lines if line.strip()]
    if path.suffix == ".json":
        return _checked_list(parse_json(read_text(path), path), path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".pt":
        import torch

        rows = torch.load(path, weights_only=True)
        return list(rows) if isinstance(rows, torch.Tensor) and rows.dim() == 2 else _checked_list(rows, path)
    raise ValueError(
        f"cannot read calibration data from {path.name!r}; give one of {', '.join(FILE_TYPES)}, or a folder"
    )


def _checked_list(rows: Any, path: Path) -> list:
    """Return rows if they are a list; refuse anything else, such as a dict of columns."""
    if not isinstance(rows, list):
        raise ValueError(
            f"{path.name} holds a {type(rows).__name__}; give a list of rows, or a 2-D tensor in a .pt file"
        )
    return rows
