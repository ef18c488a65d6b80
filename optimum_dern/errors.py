"""Tell errors caused by the user's input from internal errors of the code."""

import json
import traceback
from pathlib import Path


__all__ = ["describe_error", "is_deliberate"]

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
