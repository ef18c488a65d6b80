"""Title and summary in one or two sentences of a compression, for the top of a page or a card."""

import math
from collections.abc import Sequence
from fractions import Fraction

from ..results.report import CompressionReport


__all__ = ["mean_losses", "title", "verdict"]

MOST_NAMED = 8  # layers
SHARES = {
    Fraction(1, 4): "a quarter",
    Fraction(1, 3): "a third",
    Fraction(1, 2): "half",
    Fraction(2, 3): "two thirds",
    Fraction(3, 4): "three quarters",
}


def title(report: CompressionReport) -> str:
    """Make the title of a compressed model from the name of its source, and what its layers keep."""
    name = report.source.rstrip("/").split("/")[-1] if report.source else report.model_type
    if report.dense_layers:
        return f"{name}, {_layers(report.dense_layers)} dense"
    parts = [f"{report.after.experts} of {report.before.experts} experts"]
    if _kept_width(report) != report.before.width:
        parts.append(f"{_kept_width(report):g} of {report.before.width} neurons")
    return ", ".join([name, *parts])


def verdict(report: CompressionReport) -> str:
    """Summarise a compression: how many experts are kept, how much smaller the model is, and how its loss changed."""
    before, after, width = report.before, report.after, _kept_width(report)
    if report.dense_layers:
        return _with_losses(_dense(report), report)
    if (after.experts, width) == (before.experts, before.width):
        return f"Nothing was compressed: every layer keeps its {before.experts} routed experts."
    share = SHARES.get(Fraction(after.experts, before.experts))
    kept = f"{after.experts} of its {before.experts} routed experts"
    kept = f"{share} of its routed experts ({after.experts} of {before.experts})" if share else kept
    if after.experts == before.experts:
        kept = f"all of its {before.experts} routed experts"
    narrower = f" with {width:g} of their {before.width} neurons" if width != before.width else ""
    narrower += " on average, the others being zero" if report.kept_width is not None else ""
    return _with_losses(
        f"Each layer keeps {kept}{narrower}, which leaves {100 * report.ratio:.0f} % of the bytes.", report
    )


def _dense(report: CompressionReport) -> str:
    """Say which layers are dense now."""
    routed = len(report.layers[0].retained)
    kept = f"{routed} of {report.before.experts} routed experts" if routed else "the shared experts alone"
    verb = "is" if len(report.dense_layers) == 1 else "are"
    return (
        f"{_layers(report.dense_layers).capitalize()} {verb} dense now, without a router: {kept} work on every token, "
        f"which leaves {100 * report.ratio:.0f} % of the bytes. Other layers stay as they were."
    )


def _layers(positions: Sequence[int]) -> str:
    """Name some layers, or count them where they are many."""
    if len(positions) > MOST_NAMED:
        return f"{len(positions)} layers"
    *first, last = map(str, sorted(positions))
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def _with_losses(gain: str, report: CompressionReport) -> str:
    """Add to what was gained whether the model was trained since, and what the gain costs in quality."""
    gain += f" It was trained after the compression: {report.training}." if report.training else ""
    losses = mean_losses(report)
    if losses is None:
        return f"{gain} What that costs in quality has not been measured."
    change = losses[1] - losses[0]
    texts = "a held-out text" if len(report.evaluation) == 1 else f"{len(report.evaluation)} held-out texts"
    verb = "rose" if change > 0 else "fell"
    return (
        f"{gain} The loss on {texts} {verb} from {losses[0]:.3f} to {losses[1]:.3f} nats per token "
        f"({change:+.3f}, perplexity × {math.exp(change):.2f})."
    )


def _kept_width(report: CompressionReport) -> float | None:
    """Return the neurons of an expert, without zero padding; None where the report does not tell."""
    return report.after.width if report.kept_width is None else report.kept_width


def mean_losses(report: CompressionReport) -> tuple[float, float] | None:
    """Compute the mean losses over the texts before and after; None where no loss was measured."""
    pairs = [(pair["before"]["loss"], pair["after"]["loss"]) for pair in report.evaluation.values()]
    if not pairs:
        return None
    before, after = zip(*pairs, strict=True)
    return sum(before) / len(pairs), sum(after) / len(pairs)
