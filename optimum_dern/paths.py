"""Check that file names can be written into reports and cards, which are UTF-8 text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


__all__ = ["check_utf8"]


def check_utf8(*values: Any) -> None:
    """Refuse file names that are not UTF-8, which neither JSON, a model card nor a tokenizer can store.

    Args:
        *values: names and paths, also inside lists and mappings; anything else passes.

    Raises:
        ValueError: a name with bytes that are not UTF-8.
    """
    for value in values:
        if isinstance(value, str | Path):
            _check(str(value))
        elif isinstance(value, Mapping | list | tuple):
            check_utf8(*value)


def _check(name: str) -> None:
    if "\0" in name:
        raise ValueError(f"{ascii(name)} holds a null character, which no name or path has; leave it out")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"the name {ascii(name)} is not UTF-8 text, so it cannot be written into a report; rename the file or "
            "folder"
        ) from None
