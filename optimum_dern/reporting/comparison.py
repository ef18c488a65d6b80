"""Rows of a table that compares models, for the terminal and as markdown."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from ..results.estimate import error_text, paired_difference, plus_minus


__all__ = ["comparison_rows", "markdown_table"]

GIB, MIB = 2**30, 2**20


def comparison_rows(comparison: Any) -> tuple[list[str], list[list[str]]]:
    """Make the header and rows of a comparison, with one column per model; what was not measured is left out.

    Args:
        comparison: an `evaluation.compare.models.Comparison`; all models are compared with the first.
    """
    models = comparison.models
    first = models[0]
    rows = [["experts per layer", *(f"{m.experts}, {m.experts_per_token} a token" for m in models)]]
    rows += _ratios("parameters", [m.parameters for m in models])
    rows += _ratios("active per token", [m.active_parameters for m in models])
    rows += _ratios("weights on disk", [m.disk_bytes for m in models], _bytes)
    if first.memory_bytes:
        rows += _ratios("peak memory", [m.memory_bytes for m in models], _bytes)
        for name in ("prefill", "decode"):
            rows += _ratios(f"{name}, tokens/s", [median(getattr(m, name)) for m in models], "{:,.0f}".format)
    if lengths := [_longest(m.losses) for m in models if m.losses]:
        rows.append(["text, tokens a sequence", *(f"{length:,}" for length in lengths)])
    for text in first.losses:
        values = [(m.losses[text]["loss"], m.losses[text]["standard_error"]) for m in models]
        rows.append(_differences(f"loss, {text}", values))
    for key, name in (("kl", "KL from the original"), ("top1", "same top token")):
        if first.losses:
            rows.append([name, "", *(f"{_mean(m.agreement, key):.4f}" for m in models[1:])])
    for task, result in first.tasks.items():
        rows.append(_task_row(task, result, [m.tasks[task] for m in models[1:]]))
    return ["", *(_name(m.path) for m in models)], rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a markdown table, its first column aligned to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratios(name: str, values: Sequence[float], form: Any = "{:,}".format) -> list[list[str]]:
    first, *rest = values
    return [[name, form(first), *(f"{form(value)} (x {value / first:.2f})" for value in rest)]]


def _differences(name: str, values: Sequence[tuple[float, float | None]]) -> list[str]:
    (first, error), *rest = values
    return [name, plus_minus(first, error), *(f"{value:.4f} ({value - first:+.4f})" for value, _ in rest)]


def _longest(losses: dict[str, dict[str, Any]]) -> int:
    """Return the number of tokens of the longest sequence of all texts."""
    return max(loss["sequence_length"] for loss in losses.values())


def _mean(agreement: dict[str, dict[str, Any]], key: str) -> float:
    """Compute the mean of a value over the texts, with equal weights."""
    return fmean(result[key]["value"] for result in agreement.values())


def _task_row(name: str, first: dict[str, Any], rest: Sequence[dict[str, Any]]) -> list[str]:
    """Make a task's row: accuracies, and their changes with the standard error of the paired difference."""
    metric = first["main_metric"]
    value = first["metrics"][metric]
    cells = [plus_minus(value["value"], value["standard_error"])]
    for result in rest:
        change = paired_difference(first["values"], result["values"])
        accuracy = result["metrics"][metric]["value"]
        cells.append(f"{accuracy:.4f} ({change.value:+.4f} ± {error_text(change.standard_error)})")
    return [f"{name}, {metric}", *cells]


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
