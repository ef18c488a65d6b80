"""Text files replaced as a whole: whoever reads one finds the old text or the new one."""

import json
import os
from pathlib import Path
from typing import Any


__all__ = ["replace_json", "replace_text"]


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a text file under a temporary name beside it, and rename it; on an error the old file stays.

    Args:
        path: of the file, whose folder exists.
        text: all of it.
        durable: have it on the disk before the old one goes, for what a run goes on from after a crash.
    """
    if path.exists() and not path.is_file():  # such as /dev/stdout, which nothing can replace
        path.write_text(text, "utf-8")
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_json(path: Path, value: Any) -> None:
    """Write an indented JSON file likewise."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
