"""Means with standard errors over independently drawn items."""

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
    """A mean and its standard error, which is nan for a single item."""

    value: float
    standard_error: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "standard_error": json_error(self.standard_error)}


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Compute the mean over tokens and its standard error, with whole sequences as the independent draws.

    Args:
        sums: sum over the tokens of each sequence.
        counts: number of tokens of each sequence.

    Returns:
        The ratio of the totals, and the standard error of that ratio, nan for a single sequence.

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
    """Convert a standard error for JSON, with None for nan."""
    return None if math.isnan(error) else error


def error_text(error: float | None) -> str:
    """Format a standard error, with a dash if there is none."""
    return "–" if error is None or math.isnan(error) else f"{error:.4f}"


def plus_minus(value: float, error: float | None) -> str:
    """Format a value and its standard error."""
    return f"{value:.4f} ± {error_text(error)}"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of independent items.

    Args:
        values: one per item, at least one.
    """
    return Estimate(*mean_and_error(values, [1] * len(values)))


def perplexity_estimate(log_likelihoods: Sequence[float]) -> Estimate:
    """Estimate the perplexity exp(-mean) of log-likelihoods, with its error propagated from that of the mean."""
    mean = mean_estimate(log_likelihoods)
    value = math.inf if mean.value < -709 else math.exp(-mean.value)
    return Estimate(value, value * mean.standard_error)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Estimate the mean of `second - first` over items on which both were measured.

    Two models mostly fail on the same items, so this error is smaller than what the two separate errors suggest.

    Raises:
        ValueError: different numbers of items.
    """
    if len(first) != len(second):
        raise ValueError(f"cannot pair {len(first)} items with {len(second)}; measure both on the same items")
    return mean_estimate([b - a for a, b in zip(first, second, strict=True)])
