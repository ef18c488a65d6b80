"""Tell errors caused by the user's input, or by the machine, from internal errors of the code."""

import errno
import json
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = ["describe_error", "explained", "is_deliberate", "naming"]

PACKAGE = Path(__file__).parent
ROOM = "free some space there, or choose a folder on another disk"
RIGHTS = "choose another one, or have its permissions changed"
FILES = "raise the limit on open files (ulimit -n)"
MENDS = {  # errors of the system -> what to do about them
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: f"{ROOM}, or raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: RIGHTS,
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.EIO: "check the disk, or the connection to it",
    errno.ENOMEM: "lower the batch size or set a memory limit where there are such options, or raise the limit on the "
    "process (ulimit -v)",
}
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "failed to map segment")


def is_deliberate(error: BaseException) -> bool:
    """Return whether an error is a deliberate refusal of the user's input, not an internal error.

    A refusal comes from a `raise` statement: a ValueError of any library, or a ValueError, TypeError or RuntimeError
    of this package.  What the machine lacks (files, networks, modules, space, memory), and files that are not text or
    JSON, always count as one.

    Args:
        error: a caught exception, with its traceback.
    """
    if isinstance(error, OSError | ImportError | UnicodeError | json.JSONDecodeError):
        return True
    if _system_error(error) in MENDS:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].line.startswith("raise"):
        return False
    refusals = (ValueError, TypeError, RuntimeError) if PACKAGE in Path(frames[-1].filename).parents else ValueError
    return isinstance(error, refusals)


def describe_error(error: BaseException) -> str:
    """Return the message of an error: with what to do if the machine is at fault, with its type if the code is."""
    number = _system_error(error)
    if number in MENDS:
        return f"{_name_failure(error, number)}; {MENDS[number]}, then give the same command again"
    return str(error) if is_deliberate(error) else f"{type(error).__name__}: {error}"


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Name a file in the system's errors that tell none, such as those of writing, and in what libraries make of them.

    Args:
        path: of the file.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error).lower())):  # of libraries in Rust
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def explained(what: str, mend: str) -> Iterator[None]:
    """Turn whatever another library raises about a file of the user's into a ValueError that says what to do.

    Refusals that say so themselves pass: missing files and modules, and a ValueError of any library that it raises.

    Args:
        what: the file, and that it cannot be read.
        mend: what to do about it.

    Raises:
        ValueError: the library has failed.
    """
    try:
        yield
    except Exception as error:
        names_nothing = isinstance(error, UnicodeError | json.JSONDecodeError)
        if is_deliberate(error) and not names_nothing:
            raise
        reason = next(iter(str(error).splitlines()), "")[:300]
        raise ValueError(f"{what} ({type(error).__name__}: {reason}); {mend}") from error


def _system_error(error: BaseException) -> int | None:
    """Return the number of the system's error that is behind an error, also where a library tells it only in words."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno
    text = str(error).lower()
    if isinstance(error, RuntimeError | ImportError) and any(part in text for part in OUT_OF_MEMORY):
        return errno.ENOMEM
    found = re.search(r"\(os error (\d+)\)", text)  # of libraries in Rust
    return int(found[1]) if found else None


def _name_failure(error: BaseException, number: int) -> str:
    """Say in a few words what the system has refused, and for which file."""
    if number == errno.ENOMEM:
        return f"not enough memory ({str(error).strip() or type(error).__name__})"
    if not isinstance(error, OSError):
        return str(error)
    where = error.filename2 or error.filename
    return f"{error.strerror}: {where}" if where else str(error.strerror)
