"""Checks of single options of a compression: type, range, and the words of the error message."""

import json
import math
from collections.abc import Sequence
from dataclasses import Field
from numbers import Integral, Real
from pathlib import Path
from typing import Any


__all__ = [
    "check_choice",
    "checked_layers",
    "checked_protection",
    "checked_similarity",
    "checked_value",
    "retained_as_reported",
]

PROTECTION = (
    "map decoder layers to lists of experts, like {3: [0, 5]}, be 'super', or be the path of a dern_report.json"
)
# Accepted types (by a field's annotation) and ranges (by its name), each with the words of the error message.
KINDS = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: (str, "a name"),
}
COUNTS = (
    "cluster_iterations",
    "refit_sweeps",
    "num_samples",
    "sequence_length",
    "batch_size",
    "experts_multiple_of",
    "width",
    "width_multiple_of",
)
RANGES = {
    "num_experts": (lambda value: value >= 0, "of at least 1"),  # 0 is refused where it means nothing
    **dict.fromkeys(COUNTS, (lambda value: value >= 1, "of at least 1")),
    **dict.fromkeys(("refit_ridge", "cluster_tolerance"), (lambda value: value > 0, "above 0")),
    "sparsity": (lambda value: 0 <= value < 1, "of at least 0 and below 1 (the fraction dropped)"),
    "width_sparsity": (lambda value: 0 < value < 1, "above 0 and below 1 (the fraction dropped)"),
    **dict.fromkeys(("self_share", "random_share"), (lambda value: 0 <= value < 1, "of at least 0 and below 1")),
    "drift_correction": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),
}


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those of an option.

    Raises:
        ValueError: naming them.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}")


def checked_value(option: Field, value: Any) -> Any:
    """Check the type and range of an option's value, and convert numpy numbers to Python's.

    Args:
        option: field of `DernOptions`.
        value: given for it.

    Raises:
        ValueError: naming the range.
    """
    kind = next((kind for kind in KINDS if option.type in (kind, kind | None)), None)
    if kind is None or (value is None and option.default is None):
        return value
    accepted, words = KINDS[kind]
    holds, range_words = RANGES.get(option.name, (lambda value: True, ""))
    of_kind = isinstance(value, bool) == (kind is bool) and isinstance(value, accepted)
    if not of_kind or (isinstance(value, Real) and not _is_finite(value)) or not holds(value):
        raise ValueError(f"{option.name}={value!r}, but it must be {words} {range_words}".rstrip())
    return kind(value)


def checked_layers(given: Any) -> int | list[int]:
    """Check a number of layers, or the indices of some; those come out ascending, each once.

    Raises:
        ValueError: it is neither.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    numbers = list(given) if several else [given]
    whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
    if not numbers or not whole or min(numbers) < (0 if several else 1):
        raise ValueError(
            f"condensed_layers={given!r}, but it must be a list of decoder layers, such as [3, 5], or a whole number "
            "of layers of at least 1"
        )
    return sorted({int(number) for number in numbers}) if several else int(given)


def checked_similarity(given: Any) -> tuple[float, float, float]:
    """Check the weights of gate, up and down projections in the similarity of neurons.

    Raises:
        ValueError: they are not three finite weights, or all zero.
    """
    try:
        weights = tuple(float(weight) for weight in given)
    except (TypeError, ValueError):  # no numbers, or nothing that has several
        weights = ()
    if len(weights) != 3 or not all(map(_is_finite, weights)) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"similarity_weights={given!r}, but it must be three finite weights >= 0 (gate, up, down), not all zero"
        )
    return weights


def checked_protection(protect: Any) -> dict[int, list[int]]:
    """Convert a map from decoder layers to protected experts to plain numbers, as JSON and numpy write them otherwise.

    Raises:
        ValueError: it is no such map.
    """
    try:
        return {int(layer): sorted({int(expert) for expert in experts}) for layer, experts in protect.items()}
    except (AttributeError, TypeError, ValueError) as error:  # no mapping, no list, no number
        raise ValueError(f"protect_experts={protect!r}, but it must {PROTECTION}") from error


def retained_as_reported(path: Path) -> dict[int, list[int]]:
    """Read the retained experts by layer from the report of an earlier run.

    Raises:
        ValueError: it is no `dern_report.json`.
    """
    try:
        layers = json.loads(path.read_text("utf-8"))["layers"]
        return checked_protection({layer["layer"]: layer["retained"] for layer in layers})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"protect_experts={str(path)!r} is not a dern_report.json ({error!r:.200}); it must {PROTECTION}"
        ) from error


def _is_finite(value: Real) -> bool:
    """Return whether a number is finite as a float (integers may be too large for one)."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
