"""One input for one reader: whether it is read, refused in plain words, or does harm."""

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from fuzz_readers import READERS

from optimum_dern.errors import PACKAGE, describe_error, is_deliberate


__all__ = ["Outcome", "attempt", "read_valid_files"]

SECONDS = 10.0
LAZY = ("encodings", "jinja2.debug")  # modules that the standard library and jinja import for an error


class Outcome(NamedTuple):
    """What a reader has made of a file."""

    kind: str  # "read", "refused" or "failed"
    says: str = ""  # the refusal, or what is wrong
    place: str = ""  # in our code, of the refusal


def attempt(reader: str, content: bytes) -> Outcome:
    """Read a file in a folder of its own.

    Args:
        reader: a key of `READERS`.
        content: of the file.
    """
    file, _, read = READERS[reader]
    with TemporaryDirectory() as name:
        folder = Path(name) / "inside"
        folder.mkdir()
        (folder / file).write_bytes(content)
        modules, started = set(sys.modules), time.perf_counter()
        outcome = _read(read, folder)
        if time.perf_counter() - started > SECONDS:
            return Outcome("failed", "took too long")
        if new := {m for m in set(sys.modules) - modules if not m.startswith(LAZY)}:
            return Outcome("failed", f"imported {sorted(new)[:3]}")
        if [entry.name for entry in Path(name).iterdir()] != ["inside"]:
            return Outcome("failed", "wrote outside")
        return outcome._replace(says=outcome.says.replace(f"{folder}/", "").replace(str(folder), ""))


def _read(read: Callable[[Path], Any], folder: Path) -> Outcome:
    try:
        read(folder)
    except Exception as error:
        if not is_deliberate(error) or isinstance(error, ImportError):
            return Outcome("failed", "".join(traceback.format_exception(error)[-3:]))
        return Outcome("refused", describe_error(error), place_of(error))
    return Outcome("read")


def read_valid_files(readers: list[str]) -> None:
    """Read a valid file of each reader: what readers import for these counts for nothing.

    Raises:
        RuntimeError: one is not read.
    """
    for reader in readers:
        attempt(reader, READERS[reader][1]())
        if (outcome := attempt(reader, READERS[reader][1]())).kind != "read":
            raise RuntimeError(f"{reader}: a valid file is not read: {outcome.says}")


def place_of(error: BaseException) -> str:
    """Tell refusals apart: the statement of ours that has raised it, and the type of what it has made of."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(frame.filename).parents]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{where} {type(error).__name__} {type(error.__cause__).__name__}"
