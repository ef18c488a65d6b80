"""Downloaded files are what the Hub has: their hashes are compared, since its client compares only their sizes."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


__all__ = ["check_downloaded"]

PIECE = 1 << 22  # bytes that are hashed at a time


def check_downloaded(files: Iterable[Path]) -> None:
    """Refuse downloaded files that have arrived damaged, and remove them, so that they are downloaded again.

    Args:
        files: in the Hub's cache: links to files that are named by their SHA-256 (large ones) or their git object id.
            Others are not checked.

    Raises:
        OSError: a file is damaged.
    """
    damaged = [file for file in files if _is_damaged(file)]
    for file in damaged:
        file.resolve().unlink()
        file.unlink()
    if damaged:
        raise OSError(
            f"{damaged[0].name} has arrived damaged: its bytes are not those that the Hub has announced; it is "
            "removed from the cache: check the connection, then give the same command again"
        )


def _is_damaged(file: Path) -> bool:
    name = Path(os.readlink(file)).name if file.is_symlink() and file.is_file() else ""
    return len(name) in HASHES and name != HASHES[len(name)](file)


def _sha256(file: Path) -> str:
    return _digest(hashlib.sha256(), file)


def _git_id(file: Path) -> str:
    return _digest(hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False), file)


def _digest(digest: Any, file: Path) -> str:
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


HASHES = {64: _sha256, 40: _git_id}  # by the length of the name
