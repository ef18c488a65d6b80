"""How many experts each layer keeps, where they may differ: as many in all, where they are missed least.

The relative output error of plain pruning, by number of retained experts, is measured in every layer of the original
model, in one pass over the calibration data and on held-out tokens.  The counts are then those of the least sum of
errors among all that keep the same number of experts in all.  That minimum is exact (dynamic programming over the
layers): the curves are not convex, and dropping one expert after the other where the error grows least gets stuck at
layers whose first dropped expert costs much and whose next ones cost nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy
from torch import nn

from ..config import DernConfig
from ..models.refusals import resolve_count
from ..models.structure import MoELayer
from ..options import OFF
from .distributed import ALONE, Processes
from .layers import compress_layers_
from .targets import Target


__all__ = ["allocate_counts", "find_layer_counts", "pruning_errors"]

MEASURED = 17  # counts, at most; errors of those between are interpolated
PRUNE = {"method": "prune", "refit": False, **OFF, "guard": True}


def find_layer_counts(
    model: nn.Module,
    layers: list[MoELayer],
    batches: Sequence[dict],
    config: DernConfig,
    num_experts: int,
    processes: Processes = ALONE,
) -> dict[int, int]:
    """How many experts each layer shall keep.

    Args:
        model: the original, in evaluation mode; it stays as it is.
        layers: its MoE layers.
        batches: of calibration tokens.
        config: of the compression.
        num_experts: mean over the layers.
        processes: that share the batches.

    Returns:
        Counts by position of the decoder layer, all of which the router's groups and `experts_multiple_of` allow.
    """
    allowed = _allowed_counts(layers[0], config)
    chosen = numpy.linspace(0, len(allowed) - 1, min(MEASURED, len(allowed))).round().astype(int)
    measured = pruning_errors(model, layers, batches, config, [allowed[i] for i in chosen], processes)
    curves = {at: numpy.interp(allowed, list(curve), list(curve.values())) for at, curve in measured.items()}
    errors = {at: dict(zip(allowed, curve.tolist(), strict=True)) for at, curve in curves.items()}
    return allocate_counts(errors, num_experts * len(layers))


def pruning_errors(
    model: nn.Module,
    layers: list[MoELayer],
    batches: Sequence[dict],
    config: DernConfig,
    counts: Sequence[int],
    processes: Processes = ALONE,
) -> dict[int, dict[int, float]]:
    """Relative output error of plain pruning on held-out tokens, by decoder layer and number of retained experts."""
    probe = replace(config, calibration_order="oneshot", **PRUNE)
    targets = [Target(probe, count) for count in counts]
    if len(targets) == 1:  # several leave the model as it is, a single one would not
        targets.append(Target(probe, counts[0]))
    found = compress_layers_(model, layers, batches, targets, processes=processes)
    errors: dict[int, dict[int, float]] = {}
    for count, reports in zip(counts, found, strict=False):
        for report in reports:
            errors.setdefault(report.layer, {})[count] = report.errors[report.winner]
    return errors


def allocate_counts(errors: Mapping[int, Mapping[int, float]], total: int) -> dict[int, int]:
    """The counts of the least sum of errors that make up a total.

    Args:
        errors: by layer and count.
        total: of all layers' counts.

    Returns:
        One count a layer; of equal sums, the one that keeps more in earlier layers.

    Raises:
        ValueError: no counts make up the total.
    """
    least = numpy.full(total + 1, numpy.inf)  # sum of errors of the layers so far, by their experts
    least[0] = 0.0
    choices: list[numpy.ndarray] = []
    for curve in errors.values():
        best, choice = numpy.full(total + 1, numpy.inf), numpy.zeros(total + 1, dtype=int)
        for count, error in sorted(curve.items()):
            if count > total:
                continue
            reached = least[: total + 1 - count] + error
            better = reached < best[count:]
            best[count:][better], choice[count:][better] = reached[better], count
        least = best
        choices.append(choice)
    if not numpy.isfinite(least[total]):
        raise ValueError(f"the layers' counts cannot make up {total} experts; choose another number")
    counts = []
    for choice in reversed(choices):
        counts.append(int(choice[total]))
        total -= counts[-1]
    return dict(zip(errors, reversed(counts), strict=True))


def _allowed_counts(layer: MoELayer, config: DernConfig) -> list[int]:
    """The counts that a layer's router works with, in steps of its groups and of `experts_multiple_of`."""
    allowed = set()
    for count in range(layer.num_groups, layer.num_experts + 1, layer.num_groups):
        try:
            allowed.add(resolve_count(layer, 0.0, count, config.experts_multiple_of))
        except ValueError:  # too few for the router
            continue
    return sorted(allowed)
