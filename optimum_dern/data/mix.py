"""A mix of sources: the number of samples is shared in proportion to weights; what one lacks, the others give."""

import math
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

from .files import listed
from .tokens import Sample


__all__ = ["Part", "mix_samples", "read_mapping"]

logger = getLogger(__name__)


class Part(NamedTuple):
    """A source of a mix; sources need neither be hashable nor have different names."""

    name: str  # that its samples carry
    source: Any
    weight: float
    made: bool = False  # not read, but made at some cost, and never short


def read_mapping(data: Mapping) -> list[Mapping] | dict[Any, float]:
    """Interpret a mapping: a tokenizer's output becomes a list of one row, sources with weights become a mix.

    Raises:
        ValueError: anything else, such as the splits of a `datasets.DatasetDict`, or columns.
    """
    if hasattr(data.get("input_ids"), "__len__"):
        return [data]
    try:
        return {name: float(weight) for name, weight in data.items()}
    except (TypeError, ValueError, RuntimeError) as error:  # the last one of tensors
        raise ValueError(
            f"a {type(data).__name__} of {', '.join(map(repr, data))} has no weights, so it is no mix of sources; "
            f"give one of its parts, for example dataset[{next(iter(data))!r}]"
        ) from error


def mix_samples(parts: Sequence[Part], count: int, load: Callable[[Any, int], list[Sample]]) -> list[Sample]:
    """Load samples from several sources in proportion to their weights.

    Args:
        parts: the sources.
        count: samples wanted in all.
        load: loads at most so many samples of a source.

    Returns:
        The samples of the first part, of the second and so on, each with the name of its part.

    Raises:
        ValueError: there are no parts, or weights that give no shares.
    """
    weights = {i: part.weight for i, part in enumerate(parts)}
    found = weights.values()
    if not weights or not all(map(math.isfinite, found)) or min(found) < 0 or not sum(found) > 0:
        got = {part.name: part.weight for part in parts}
        raise ValueError(f"a calibration mix needs sources with finite weights >= 0, not all zero; got {got}")
    shares, short = _shares(weights, count), {}
    samples: dict[int, list[Sample]] = {i: [] for i in weights}
    while changed := [i for i, share in shares.items() if share > len(samples[i]) and i not in short]:
        changed = [i for i in changed if not parts[i].made] or changed  # shares are settled before anything is made
        samples |= {i: load(parts[i].source, shares[i]) for i in changed}
        short |= {i: len(samples[i]) for i in changed if len(samples[i]) < shares[i]}
        others = {i: weight for i, weight in weights.items() if weight and i not in short}
        shares = short | _shares(others, count - sum(short.values()))
    if short and others:
        lacking = listed([f"{_label(parts[i])} has {have}" for i, have in short.items()])
        logger.warning("too few sequences for a source's share: %s; the other sources give the rest", lacking)
    return [sample._replace(source=parts[i].name) for i, some in samples.items() for sample in some]


def _label(part: Part) -> str:
    return str(part.source) if isinstance(part.source, str | Path) else part.name


def _shares(weights: Mapping[int, float], count: int) -> dict[int, int]:
    """Divide a count into whole numbers in proportion to weights, by the largest remainder method."""
    total = sum(weights.values())
    exact = {i: count * weight / total for i, weight in weights.items()}
    shares = {i: int(share) for i, share in exact.items()}
    by_remainder = sorted(exact, key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: count - sum(shares.values())]:
        shares[i] += 1
    return shares
