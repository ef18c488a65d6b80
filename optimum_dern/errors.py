"""Which errors tell a user what to mend, and which are faults of a program."""

import json
import traceback
from pathlib import Path


__all__ = ["describe_error", "is_deliberate"]

PACKAGE = Path(__file__).parent


def is_deliberate(error: BaseException) -> bool:
    """Whether an error is a refusal of what was given, rather than an accident of the code.

    A refusal comes from a `raise` statement: a ValueError of any library, or whatever this package raises to refuse.
    Files, networks and modules that are not there, or hold no text or JSON, are nobody's accident, whoever finds out.

    Args:
        error: caught, so that it has its traceback.
    """
    if isinstance(error, OSError | ImportError | UnicodeError | json.JSONDecodeError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].line.startswith("raise"):
        return False
    refusals = (ValueError, TypeError, RuntimeError) if PACKAGE in Path(frames[-1].filename).parents else ValueError
    return isinstance(error, refusals)


def describe_error(error: BaseException) -> str:
    """The message of a refusal; of an accident, its type as well, which is often half of what is known."""
    return str(error) if is_deliberate(error) else f"{type(error).__name__}: {error}"
