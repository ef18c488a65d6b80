"""Tables and the plot of what `calibration.py` has measured."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any


__all__ = ["ORDER", "plot", "tables", "task_tables"]

DOMAINS = ("news", "code", "books", "math")
ORDER = [
    *(domain + added for added in ("", "+self") for domain in DOMAINS),
    *("mix", "mix+self", "self", "self512"),
    *(domain + added for added in ("+random", "+self+random") for domain in DOMAINS),
]


def tables(results: dict[str, Any]) -> str:
    """Format a table per model: a row per calibration and method, means over the draws."""
    parts = []
    for name, result in results.items():
        texts = list(result["loss"])
        parts.append(f"\n{name}\n\n| calibrated on | method | {' | '.join(texts)} | mean | draws |")
        parts.append("|---|---|" + "---:|" * (len(texts) + 2))
        keys = dict.fromkeys((row["calibration"], row["method"]) for row in result["rows"])
        for calibration, method in sorted(keys, key=lambda key: (ORDER.index(key[0]), key[1])):
            rows = rows_of(result, calibration, method)
            cells = [f"{fmean(row['increase'][text] for row in rows):+.3f}" for text in texts]
            means = [fmean(row["increase"].values()) for row in rows]
            spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
            cells += [f"{fmean(means):+.3f}{spread}", str(len(rows))]
            parts.append(f"| {calibration} | {method} | {' | '.join(cells)} |")
    return "\n".join(parts)


def task_tables(results: dict[str, Any]) -> str:
    """Format a table per model with tasks: accuracies, with the standard errors over a task's items, of one draw."""
    parts = []
    for name, result in results.items():
        scored = [row for row in result["rows"] if "tasks" in row]
        if not scored:
            continue
        tasks = list(result["tasks"])
        parts.append(f"\n{name}\n\n| calibrated on | method | {' | '.join(tasks)} |\n|---|---|" + "---:|" * len(tasks))
        for row in [{"calibration": "", "method": "full model", "tasks": result["tasks"]}, *scored]:
            cells = [f"{row['tasks'][task][0]:.3f} ± {row['tasks'][task][1]:.3f}" for task in tasks]
            parts.append(f"| {row['calibration']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(parts)


def rows_of(result: dict[str, Any], calibration: str, method: str) -> list[dict]:
    """Return the rows of a calibration and method, one a draw."""
    return [row for row in result["rows"] if (row["calibration"], row["method"]) == (calibration, method)]


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the loss increase on every text: plain pruning and `recommended` by calibration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "calibration", "svg.fonttype": "none"}  # reproducible and small
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 5), squeeze=False, sharey=True)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        there = {row["calibration"] for row in result["rows"] if row["method"] == "recommended"}
        shown = [calibration for calibration in ORDER if calibration in there]
        for method, colour in (("prune, router", "#D55E00"), ("recommended", "#0072B2")):
            for place, calibration in enumerate(shown):
                rows = rows_of(result, calibration, method)
                points = [fmean(row["increase"][text] for row in rows) for text in result["loss"]] if rows else []
                axis.plot(points, [place] * len(points), "o", color=colour, alpha=0.5, markersize=4)
                if points:
                    label = method if place == 0 else None
                    axis.plot(fmean(points), place, "|", color=colour, markersize=16, markeredgewidth=3, label=label)
        axis.set(title=name, xlabel="loss increase, nats per token (dots: texts, bars: means)")
        axis.set_yticks(range(len(shown)), shown)
        axis.grid(alpha=0.25, axis="x")
        axis.legend(frameon=False)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
