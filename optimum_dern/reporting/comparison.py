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
    rows.append(_ratios("parameters", [m.parameters for m in models]))
    rows.append(_ratios("active per token", [m.active_parameters for m in models]))
    rows.append(_ratios("weights on disk", [m.disk_bytes for m in models], _bytes))
    if first.memory_bytes:
        rows.append(_ratios("peak memory", [m.memory_bytes for m in models], _bytes))
        for name in ("prefill", "decode"):
            rows.append(_ratios(f"{name}, tokens/s", [median(getattr(m, name)) for m in models], "{:,.0f}".format))
    if first.losses:
        lengths = [max(loss["sequence_length"] for loss in m.losses.values()) for m in models]
        rows.append(["text, tokens a sequence", *(f"{length:,}" for length in lengths)])
        rows += [_loss_row(text, [m.losses[text] for m in models]) for text in first.losses]
        for key, name in (("kl", "KL from the original"), ("top1", "same top token")):
            means = [fmean(result[key]["value"] for result in m.agreement.values()) for m in models[1:]]
            rows.append([name, "", *(f"{mean:.4f}" for mean in means)])
    for task, result in first.tasks.items():
        rows.append(_task_row(task, result, [m.tasks[task] for m in models[1:]]))
    return ["", *(m.path.rstrip("/").rsplit("/", 1)[-1] for m in models)], rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a markdown table, its first column aligned to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratios(name: str, values: Sequence[float], form: Any = "{:,}".format) -> list[str]:
    first, *rest = values
    return [name, form(first), *(f"{form(value)} (x {value / first:.2f})" for value in rest)]


def _loss_row(text: str, losses: Sequence[dict[str, Any]]) -> list[str]:
    first, *rest = (loss["loss"] for loss in losses)
    changes = (f"{loss:.4f} ({loss - first:+.4f})" for loss in rest)
    return [f"loss, {text}", plus_minus(first, losses[0]["standard_error"]), *changes]


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
