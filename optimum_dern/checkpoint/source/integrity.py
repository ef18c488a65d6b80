"""Downloaded files are what the Hub has: their hashes are compared, since its client compares only their sizes."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


__all__ = ["whole_downloads"]

PIECE = 1 << 22  # bytes that are hashed at a time


@contextmanager
def whole_downloads(repository: Path) -> Iterator[None]:
    """Refuse files that arrive damaged while the context is open, and remove them, so that they are downloaded again.

    What was in the cache before is taken as it is: its owner may have changed it.

    Args:
        repository: its folder in the Hub's cache, with links to files that are named by their SHA-256 (large ones) or
            their git object id; files with other names are not checked.

    Raises:
        OSError: a file is damaged.
    """
    before = {file.name for file in repository.glob("blobs/*")}
    try:
        yield
    finally:  # also where the connection broke: later runs take what has arrived as it is
        links = [file for file in sorted(repository.glob("snapshots/**/*")) if file.is_symlink() and file.is_file()]
        damaged = [file for file in links if _name(file) not in before and _is_damaged(file)]
        for file in damaged:
            file.resolve().unlink()
            file.unlink()
        if damaged:
            raise OSError(
                f"{damaged[0].name} has arrived damaged: its bytes are not those that the Hub has announced; it is "
                "removed from the cache: check the connection, then give the same command again"
            )


def _name(link: Path) -> str:
    return Path(os.readlink(link)).name


def _is_damaged(link: Path) -> bool:
    name = _name(link)
    return len(name) in HASHES and name != HASHES[len(name)](link)


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
