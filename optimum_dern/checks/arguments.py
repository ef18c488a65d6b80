"""Checks of the kinds of arguments, for functions that users call."""

import math
from numbers import Real
from typing import Any


__all__ = ["check_argument", "check_number"]


def check_argument(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse an argument of another kind.

    Args:
        name: of the argument.
        value: given for it.
        kinds: that it may have.
        wanted: what to give, in words.

    Raises:
        TypeError: it has none of them.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} is the {type(value).__name__} {value!r:.80}; give {wanted}")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, whole: bool = True) -> None:
    """Refuse what is no finite number, or out of range.

    Raises:
        ValueError: naming what is allowed.
    """
    kind, words = (int, "whole") if whole else (Real, "finite")
    fits = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most
    if not fits or abs(value) == math.inf:
        span = f" of at least {least}" if most == math.inf else f" from {least} to {most}"
        raise ValueError(f"{name}={value!r}, but it must be a {words} number{'' if least == -math.inf else span}")
