"""Atomic replacement of text files, where readers see either the old content or the new one, and reading of JSON."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import naming


__all__ = [
    "json_text",
    "parse_object",
    "read_object",
    "replace_by_copy",
    "replace_json",
    "replace_rows",
    "replace_text",
    "replacing",
]

HALF = re.compile("[\ud800-\udfff]")  # of a pair that stands for one character in UTF-16, and for nothing alone


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Replace a text file atomically, through a temporary file in the same folder.

    Args:
        path: of the file; its folder must exist.
        text: the whole new content.
        durable: flush the new content to disk before the rename, for files that a resumed run relies on.
    """
    if path.exists() and not path.is_file():  # such as /dev/stdout, which nothing can replace
        path.write_text(text, "utf-8")
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def replace_by_copy(path: Path, source: Path) -> None:
    """Replace a file of any kind atomically by a copy of another.

    Args:
        path: of the file; its folder must exist.
        source: of the new content.
    """
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Open the context in which a file beside another is written, which then takes its name; removed on an error.

    Several that belong together are written in contexts within one another: what is opened first gets its name last.

    Args:
        path: of the file; its folder must exist.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_json(path: Path, value: Any) -> None:
    """Replace a file atomically by indented JSON."""
    replace_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Encode a value as indented JSON, as the files of results are."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def replace_rows(path: Path, rows: Iterable[Any]) -> None:
    """Replace a file atomically by JSON lines, one for each row."""
    replace_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of somebody else's, which may hold anything.

    Raises:
        ValueError: it is no UTF-8 text, no JSON, or no object; the message names the file.
    """
    return parse_object(path.read_bytes(), path.name)


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: UTF-8, with or without a byte order mark.
        name: of where it comes from, for the error.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON ({error})"
        raise ValueError(f"{name} {reason}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__} where a JSON object is needed; download it again")
    if b"\\ud" in content.lower() and HALF.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{name} holds one half of a surrogate pair, which no text has; download it again")
    return value
