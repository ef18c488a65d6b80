"""Tables and plot of the results of `quality.py`.

python benchmarks/quality_table.py benchmarks/results/quality.json [--plot docs/source/images/quality.svg]
python benchmarks/quality_table.py benchmarks/results/quality.json --summary       # or --recovery
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


VARIANTS = {"published": "as published", "refit": "+ refit", "guard": "+ guard", "router": "+ router refit"}
OPTIONAL = ("guard",)  # no column where there is no row


def markdown_tables(name: str, result: dict[str, Any]) -> str:
    """Format one table per sparsity with a row per method and variant: means over domains and seeds, with spreads."""
    full = result["loss"]
    parts = [f"\n{name}: full model {fmean(full.values()):.4f} nats per token, {result['parameters']:,} parameters"]
    for sparsity in sorted({row["sparsity"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["sparsity"] == sparsity]
        parts.append(f"\n{sparsity:.0%} of the experts dropped, {rows[0]['parameters']:,} parameters left\n")
        tasks = sorted({task for row in rows for task in row.get("tasks", {})})
        header = ["method", "loss", "seeds", *full, "KL", "same top token", *tasks]
        parts += [line(header), line(["---", *["---:"] * (len(header) - 1)])]
        groups = grouped(rows)
        for key in sorted(groups, key=lambda key: mean_of(groups[key], "loss")):
            parts.append(line([" + ".join(filter(None, key)), *figures(groups[key], list(full), tasks)]))
    return "\n".join(parts)


def summary(results: dict[str, Any]) -> str:
    """Format loss increases, published and `recommended`: a row per method, a column per model and sparsity."""
    columns = [
        (name, sparsity) for name in results for sparsity in sorted({r["sparsity"] for r in results[name]["rows"]})
    ]
    cells: dict[str, dict[tuple[str, float], list[dict]]] = {}
    for name, result in results.items():
        for row in (row for row in result["rows"] if row["variant"] in ("published", "")):
            cells.setdefault(row["method"], {}).setdefault((name, row["sparsity"]), []).append(row)
    order = [column for column in columns if column[1] == 0.5] or columns
    return table_of(cells, {(name, sparsity): f"`{name}`, {sparsity:.0%}" for name, sparsity in columns}, order)


def recovery(results: dict[str, Any]) -> str:
    """Format, one table per sparsity, how much of every method's loss increase refits recover."""
    levels = sorted({row["sparsity"] for result in results.values() for row in result["rows"]})
    return "\n".join(f"\n{level:.0%} of the experts dropped\n\n{recovery_at(results, level)}" for level in levels)


def recovery_at(results: dict[str, Any], sparsity: float) -> str:
    """Format the table of one sparsity: a row per method, a column per model and variant."""
    columns, cells = {}, {}
    for name, result in results.items():
        rows = [row for row in result["rows"] if row["sparsity"] == sparsity]
        draws = {row["seed"] for row in rows if row["variant"] == "router"}
        rows = [row for row in rows if row["seed"] in draws and row["variant"] in VARIANTS]
        there = {row["variant"] for row in rows}
        for variant, title in VARIANTS.items():
            if variant in there or variant not in OPTIONAL:
                columns[name, variant] = f"`{name}`, {title}"
        for row in rows:
            cells.setdefault(row["method"], {}).setdefault((name, row["variant"]), []).append(row)
    return table_of(cells, columns, [column for column in columns if column[1] == "router"])


def table_of(cells: dict[str, dict[tuple, list[dict]]], columns: dict[tuple, str], order: list[tuple]) -> str:
    """Format runs by method and column as a table, sorted by the sum over the columns of `order`."""
    parts = [line(["", *columns.values()]), line(["---", *["---:"] * len(columns)])]
    for method in sorted(cells, key=lambda m: sum(mean_of(cells[m][c], "loss") for c in order if c in cells[m])):
        parts.append(line([method, *(spread_of(cells[method].get(column, [])) for column in columns)]))
    return "\n".join(parts)


def spread_of(runs: list[dict]) -> str:
    """Format the mean over domains and seeds, with the standard deviation over seeds where there are several."""
    means = [fmean(run["loss"].values()) for run in runs]
    if not means:
        return ""
    digits = 4 if abs(fmean(means)) < 0.1 else 3
    spread = f" ± {stdev(means):.{digits}f}" if len(means) > 1 else ""
    return f"{fmean(means):+.{digits}f}{spread}"


def figures(runs: list[dict], domains: list[str], tasks: list[str]) -> list[str]:
    """Format the cells of one method and variant."""
    means = [fmean(run["loss"].values()) for run in runs]
    spread = f" ± {stdev(means):.4f}" if len(means) > 1 else ""
    by_domain = [f"{fmean(run['loss'][d] for run in runs):+.4f}" for d in domains]
    scored = [run["tasks"] for run in runs if run.get("tasks")]
    accuracies = [f"{fmean(run[task] for run in scored):.3f}" if scored else "" for task in tasks]
    others = [f"{mean_of(runs, 'kl'):.4f}", f"{mean_of(runs, 'top1'):.3f}"]
    return [f"{fmean(means):+.4f}{spread}", str(len(runs)), *by_domain, *others, *accuracies]


def grouped(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Group rows by method and variant."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"]), []).append(row)
    return groups


def mean_of(runs: list[dict], figure: str) -> float:
    """Compute the mean of a figure over domains and seeds."""
    return fmean(value for run in runs for value in run[figure].values())


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot loss increase over kept parameters: the best published methods and `recommended` coloured, others grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "quality", "svg.fonttype": "none"}  # reproducible and small files

    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4.2), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        published = [row for row in result["rows"] if row["variant"] == "published"]
        best = sorted({row["method"] for row in published}, key=rank(published))
        for position, method in enumerate(best):
            label = method if position < 3 else None
            colour = ("#0072B2", "#D55E00", "#009E73")[position] if position < 3 else "#bbbbbb"
            draw(axis, result, method, "published", color=colour, label=label, linewidth=1, zorder=2 - position / 99)
        draw(axis, result, "recommended", "", color="black", label="recommended", linewidth=2.5, zorder=3)
        axis.set(title=name, xlabel="parameters kept", yscale="log")
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("loss increase, nats per token")
    figure.suptitle(
        "Loss increase by method as published (grey: the others) and by the default of this package", fontsize=10
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def rank(rows: list[dict]) -> Callable[[str], float]:
    """Return a sort key that orders methods by their loss increase at the middle sparsity."""
    levels = sorted({row["sparsity"] for row in rows})
    middle = [row for row in rows if row["sparsity"] == levels[len(levels) // 2]]
    return lambda method: mean_of([row for row in middle if row["method"] == method], "loss")


def draw(axis: Any, result: dict[str, Any], method: str, variant: str, **style: Any) -> None:
    """Draw the line of one method over the sparsities."""
    rows = [row for row in result["rows"] if (row["method"], row["variant"]) == (method, variant)]
    points = []
    for sparsity in sorted({row["sparsity"] for row in rows}):
        runs = [row for row in rows if row["sparsity"] == sparsity]
        points.append((runs[0]["parameters"] / result["parameters"], mean_of(runs, "loss")))
    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--summary", action="store_true", help="one short table of all models")
    parser.add_argument("--recovery", action="store_true", help="what refits take back of every method")
    parser.add_argument("--plot", type=Path, help="an .svg or .png file")
    args = parser.parse_args()
    results = json.loads(args.results.read_text("utf-8"))
    if args.summary:
        print(summary(results))
    elif args.recovery:
        print(recovery(results))
    else:
        print("\n".join(markdown_tables(name, result) for name, result in results.items()))
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
