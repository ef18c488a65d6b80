"""The main plots of a report as one PNG picture for the model card; needs matplotlib (the extra `report`)."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..results.report import CompressionReport


__all__ = ["IMAGE_NAME", "image_description", "write_image"]

IMAGE_NAME = "assets/dern_report.png"
LOST, FAINT, TEXT, MUTED, LINE = "#b8500a", "#c3cad4", "#161a20", "#566070", "#dfe3ea"
RAMP = ["#bdd0e6", "#0b3c78"]  # colours of low and high saliency, as in the page
STYLE = {
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.color": MUTED,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
}


def write_image(report: CompressionReport, folder: Path) -> str | None:
    """Draw the loss by text, the error by layer, and the map of retained experts into one picture.

    Args:
        report: to draw.
        folder: of the checkpoint; the picture is written to `IMAGE_NAME` in it.

    Returns:
        `IMAGE_NAME`; None without layers or matplotlib, and then the picture of an earlier run is removed.
    """
    path = folder / IMAGE_NAME
    if not report.layers or find_spec("matplotlib") is None:
        path.unlink(missing_ok=True)
        return None
    import matplotlib
    from matplotlib.figure import Figure

    panels = [_draw_losses] if report.evaluation else []
    panels += [_draw_errors] if _errors(report) else []
    panels += [_draw_map]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels) + 0.4, 3.2), dpi=150, layout="constrained", facecolor="white")
        for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            draw(report, axes)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(temporary, format="png", metadata={"Software": None})  # no matplotlib version in the file
    temporary.replace(path)
    return IMAGE_NAME


def image_description(report: CompressionReport) -> str:
    """Describe the picture in words, as its alternative text."""
    parts = [f"{name} {p['before']['loss']:.3f} to {p['after']['loss']:.3f}" for name, p in report.evaluation.items()]
    losses = f"Loss before and after: {', '.join(parts)}. " if parts else ""
    if report.dense_layers:
        return f"{losses}{len(report.dense_layers)} layers are dense; the numbers are in dern_report.json."
    stay = f"{report.after.experts} of {report.before.experts} experts stay in each of {len(report.layers)} layers"
    return f"{losses}{stay}; the numbers are in dern_report.json."


def _draw_losses(report: CompressionReport, axes: Any) -> None:
    names = list(report.evaluation)
    for row, pair in enumerate(report.evaluation.values()):
        before, after = pair["before"]["loss"], pair["after"]["loss"]
        axes.plot([before, after], [row, row], color=FAINT, zorder=1)
        label = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "color": TEXT}
        axes.annotate(f"{after - before:+.3f}", (max(before, after), row), **label)
    rows, pairs = range(len(names)), report.evaluation.values()
    axes.scatter([p["before"]["loss"] for p in pairs], rows, 36, "white", edgecolors=MUTED, label="original", zorder=2)
    axes.scatter([p["after"]["loss"] for p in pairs], rows, 36, LOST, label="compressed", zorder=2)
    axes.set_yticks(rows, [name if len(name) <= 18 else f"{name[:17]}…" for name in names])
    axes.set(title="Loss on held-out text", xlabel="nats per token", ylim=(len(names) - 0.4, -0.6))
    axes.margins(x=0.28)
    axes.grid(axis="x")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def _errors(report: CompressionReport, name: str | None = None) -> list[tuple[int, float]]:
    """List each layer's error in percent, by default of the written candidate; skips errors that are not finite."""
    pairs = [(layer.layer, 100 * layer.errors.get(name or layer.winner, math.inf)) for layer in report.layers]
    return [(layer, error) for layer, error in pairs if math.isfinite(error)]


def _draw_errors(report: CompressionReport, axes: Any) -> None:
    pruned, written = _errors(report, "pruned"), _errors(report)
    size = 36 if len(report.layers) <= 16 else 14
    if pruned:
        axes.scatter(*zip(*pruned, strict=True), size, "white", edgecolors=MUTED, label="plain pruning")
    axes.scatter(*zip(*written, strict=True), size, LOST, label="written")
    axes.set(title="Error of the experts' output", xlabel="layer", ylabel="% of its energy", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def _draw_map(report: CompressionReport, axes: Any) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = {"cmap": LinearSegmentedColormap.from_list("saliency", RAMP), "linewidths": 0}
    stay, dropped = [], []  # (expert, row, shade)
    for row, layer in enumerate(report.layers):
        retained, largest = set(layer.retained), max(layer.saliency) or 1.0
        for expert, value in enumerate(layer.saliency):
            (stay if expert in retained else dropped).append((expert, row, max(0.0, value) / largest))
    tiles = PatchCollection([Rectangle((x - 0.43, y - 0.43), 0.86, 0.86) for x, y, _ in stay], **colours)
    tiles.set(array=[shade for *_, shade in stay], clim=(0, 1))
    axes.add_collection(tiles)
    size = min(20.0, (60 / max(report.before.experts, len(report.layers))) ** 2)
    x, y, shades = zip(*dropped, strict=True) if dropped else ([], [], [])
    axes.scatter(x, y, size, shades, vmin=0, vmax=1, **colours)
    rows = range(0, len(report.layers), -(-len(report.layers) // 8))
    axes.set_yticks(rows, [report.layers[row].layer for row in rows])
    axes.set(title="Experts that stay", xlabel="expert (a dot: dropped; deeper: more salient)", ylabel="layer")
    axes.set(xlim=(-0.8, report.before.experts - 0.2), ylim=(len(report.layers) - 0.2, -0.8))
    axes.xaxis.get_major_locator().set_params(integer=True)
