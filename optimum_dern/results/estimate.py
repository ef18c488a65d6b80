"""A measured number and its standard error, over items that were drawn independently."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


__all__ = [
    "Estimate",
    "error_text",
    "json_error",
    "mean_and_error",
    "mean_estimate",
    "paired_difference",
    "perplexity_estimate",
    "plus_minus",
]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, nan where there is one item only."""

    value: float
    standard_error: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "standard_error": json_error(self.standard_error)}


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean over tokens and its standard error, sequences as independent draws, tokens within one as dependent.

    Args:
        sums: per sequence, over its tokens.
        counts: tokens of each sequence.

    Returns:
        The ratio of the totals, and the error of that ratio: nan for a single sequence, which tells nothing of it.

    Raises:
        ValueError: no token.
    """
    tokens = sum(counts)
    if not tokens:
        raise ValueError(
            "there is no token to predict: every label is -100 or the first of its sequence; give labels (a copy of "
            "input_ids) and sequences of at least two tokens"
        )
    mean = sum(sums) / tokens
    spread = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread * len(sums) / (len(sums) - 1)) / tokens if len(sums) > 1 else math.nan


def json_error(error: float) -> float | None:
    """A standard error for JSON, which has no nan."""
    return None if math.isnan(error) else error


def error_text(error: float | None) -> str:
    """A standard error for people; a dash where there is none."""
    return "–" if error is None or math.isnan(error) else f"{error:.4f}"


def plus_minus(value: float, error: float | None) -> str:
    """A value and its standard error for people."""
    return f"{value:.4f} ± {error_text(error)}"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent items.

    Args:
        values: one per item, at least one.
    """
    return Estimate(*mean_and_error(values, [1] * len(values)))


def perplexity_estimate(log_likelihoods: Sequence[float]) -> Estimate:
    """exp(-mean), as for LAMBADA's last words; its error is that of the mean, carried through the exponential."""
    mean = mean_estimate(log_likelihoods)
    value = math.inf if mean.value < -709 else math.exp(-mean.value)
    return Estimate(value, value * mean.standard_error)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `second - first` over items that both were measured on.

    Two models mostly fail on the same items, so this error is smaller than what the two separate errors suggest.

    Raises:
        ValueError: different numbers of items.
    """
    if len(first) != len(second):
        raise ValueError(f"cannot pair {len(first)} items with {len(second)}; measure both on the same items")
    return mean_estimate([b - a for a, b in zip(first, second, strict=True)])
