"""Tell errors caused by the user's input from internal errors of the code."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = ["describe_error", "explained", "is_deliberate"]

PACKAGE = Path(__file__).parent


def is_deliberate(error: BaseException) -> bool:
    """Return whether an error is a deliberate refusal of the user's input, not an internal error.

    A refusal comes from a `raise` statement: a ValueError of any library, or a ValueError, TypeError or RuntimeError
    of this package.  Missing files, networks and modules, and files that are not text or JSON, always count as one.

    Args:
        error: a caught exception, with its traceback.
    """
    if isinstance(error, OSError | ImportError | UnicodeError | json.JSONDecodeError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].line.startswith("raise"):
        return False
    refusals = (ValueError, TypeError, RuntimeError) if PACKAGE in Path(frames[-1].filename).parents else ValueError
    return isinstance(error, refusals)


def describe_error(error: BaseException) -> str:
    """Return the message of an error, preceded by its type if it is an internal error."""
    return str(error) if is_deliberate(error) else f"{type(error).__name__}: {error}"


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
