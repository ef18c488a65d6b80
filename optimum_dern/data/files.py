"""Read data files (text, JSON, Parquet, tensors), with errors that name the file and line.

Types go by the name, in capitals or not; text and JSON also compressed, as in `notes.txt.gz` or `ROWS.JSONL.ZST`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import explained
from ..paths import check_utf8


__all__ = [
    "FILE_TYPES",
    "data_files",
    "data_name",
    "file_type",
    "listed",
    "parse_json",
    "read_rows",
    "read_text",
    "skipped_names",
]

FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet", ".pt")
TEXT_TYPES = (".txt", ".jsonl", ".json")  # these may be compressed
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # suffix: what pyarrow calls it
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which Windows programs write in front of UTF-8


def file_type(path: Path) -> str:
    """Return which of `FILE_TYPES` a name has, without its compression and in lower case; "" for all others."""
    inner = _without_compression(path)
    kind = inner.suffix.lower()
    return kind if kind in (FILE_TYPES if inner == path else TEXT_TYPES) else ""


def data_name(path: Path) -> str:
    """Return a file's name without its type and compression: `notes` of notes.txt.gz."""
    return _without_compression(path).stem


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def data_files(folder: Path) -> list[Path]:
    """List the data files of a folder, sorted by name.

    Raises:
        ValueError: no data file, or a name that is not UTF-8.
    """
    files = sorted(filter(file_type, folder.iterdir()))
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
    others = sorted(entry for entry in folder.iterdir() if not file_type(entry))
    return [f"{entry.name}/" if entry.is_dir() else entry.name for entry in others]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark, compressed or not.

    Raises:
        ValueError: the file is not UTF-8, or cannot be decompressed.
        ImportError: pyarrow has been built without this compression.
    """
    content = _read_bytes(path).removeprefix(BYTE_ORDER_MARK)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 text ({error.reason}); convert the file") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path) -> bytes:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.read_bytes()
    import pyarrow  # reads all three by itself, .zst too, which Python has no module for

    if not pyarrow.Codec.is_available(compression):
        raise ImportError(f"{path.name} needs a pyarrow that reads {compression}; reinstall it, or unpack the file")
    try:
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            return stream.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be decompressed as {compression} ({error}); pack it again") from error


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
    except RecursionError as error:
        raise ValueError(f"{path}, line {line} is JSON that is nested too deeply; mend the line") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise ValueError(f"{path}, line {line} cannot be read ({error}); mend the line") from error


def read_rows(path: Path) -> Any:
    """Read the rows of a data file other than plain text, one per sequence.

    Raises:
        ValueError: an unsupported file type or content.
    """
    kind = file_type(path)
    if kind == ".jsonl":
        return _json_lines(read_text(path), path)
    if kind == ".json":
        return _json_rows(read_text(path), path)
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind == ".pt":
        import torch

        with explained(f"{path} holds no tensors", "write a list of token rows by torch.save; code in it never runs"):
            rows = torch.load(path, weights_only=True, map_location="cpu")
        return list(rows) if isinstance(rows, torch.Tensor) and rows.dim() == 2 else _checked_list(rows, path)
    raise ValueError(
        f"cannot read calibration data from {path.name!r}; give one of {', '.join(FILE_TYPES)}, or a folder"
    )


def _parquet_rows(path: Path) -> Any:
    import pyarrow.parquet
    from datasets import Dataset

    with explained(f"{path} is no Parquet file", "write it again"):
        try:
            table = pyarrow.parquet.read_table(path)  # unlike `from_parquet`, without a copy in the disk's cache
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"{path} is no Parquet file ({error}); write it again") from error  # it says so of bytes
        table.validate(full=True)  # texts are UTF-8
        return Dataset(table)


def _json_lines(text: str, path: Path) -> list:
    # Not by `datasets`: its lines must be objects with the same columns, and its errors name no line.
    return [parse_json(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_rows(text: str, path: Path) -> list:
    """Parse a JSON list, or JSON lines, which many files named .json hold."""
    try:
        rows = parse_json(text, path)
    except ValueError as error:
        if getattr(error.__cause__, "msg", None) == "Extra data":  # a whole value, and something behind it
            return _json_lines(text, path)
        raise
    return _checked_list(rows, path)


def _checked_list(rows: Any, path: Path) -> list:
    """Return rows if they are a list; refuse anything else, such as a dict of columns."""
    if not isinstance(rows, list):
        raise ValueError(
            f"{path.name} holds a {type(rows).__name__}; give a list of rows, or a 2-D tensor in a .pt file"
        )
    return rows
