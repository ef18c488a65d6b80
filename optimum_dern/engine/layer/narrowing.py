"""Make the experts of a layer's candidates narrower: every expert by as much, or each by what its neurons are worth.

With the same width for all (`width_budget="uniform"`) the checkpoint has that width.  With `"global"` experts keep as
many neurons on average, but each another number, and zero weights stand in the place of the others: what is computed
is exact, and the checkpoint has the original's width.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...config import DernConfig
from ...core.neurons.selection import PADDING, narrow, select_neurons, select_together
from ...core.neurons.statistics import NeuronStatistics
from ...methods import Candidate
from ...models.moe.structure import MoELayer
from ...models.width import resolve_width
from ..measure.measured import MeasuredLayer
from .importance import gradient_needed, score_neurons


__all__ = ["find_width", "narrow_candidates", "padding_notice", "written_width"]


def find_width(layer: MoELayer, config: DernConfig) -> int:
    """Determine how many neurons an expert of a layer keeps, on average where experts keep different numbers."""
    return resolve_width(layer, config.width, config.width_sparsity, config.width_multiple_of)


def written_width(layer: MoELayer, config: DernConfig) -> int:
    """Determine how many neurons the compressed layer's tensors have, zero padding included."""
    return layer.width if config.width_budget == "global" else find_width(layer, config)


def padding_notice(layer: MoELayer, config: DernConfig) -> str | None:
    """Return one line that tells what a checkpoint with zero padding saves; None where there will be no padding."""
    width = find_width(layer, config)
    if config.width_budget != "global" or width == layer.width:
        return None
    return (
        f"width_budget='global': experts keep {width} of {layer.width} neurons on average, each another number, and "
        "zeros fill the rest, so neither the checkpoint's size nor the memory it takes falls for it"
    )


def narrow_candidates(
    candidates: Mapping[str, Candidate], measured: MeasuredLayer, statistics: NeuronStatistics, config: DernConfig
) -> dict[str, Candidate]:
    """Keep the most important neurons of every expert, in all candidates.

    Args:
        candidates: whose experts are retained ones, as they are in the layer.
        measured: the layer of E experts.
        statistics: of its neurons.
        config: names the importance and the width.
    """
    made = {}
    for name, candidate in candidates.items():
        kept = _choose(candidate.retained.to(statistics.count.device), measured, statistics, config)
        widths = (kept != PADDING).sum(1).tolist() if config.width_budget == "global" else None
        made[name] = replace(candidate, segments=narrow(candidate.segments, kept), widths=widths)
    return made


def _choose(retained: Tensor, measured: MeasuredLayer, statistics: NeuronStatistics, config: DernConfig) -> Tensor:
    """Choose the neurons of the retained experts (N,): indices (N, width), or (N, f) with padding."""
    width, loss = find_width(measured.layer, config), gradient_needed(config)
    scores, protected = score_neurons(statistics, config)
    if config.width_budget == "uniform":
        return select_neurons(scores[retained], width, protected[retained])
    if loss is None or len(retained) < len(scores):  # what stays in later layers is not known yet
        return select_together(scores[retained], len(retained) * width, protected[retained])
    layers = measured.neurons[loss]
    ranked = [score_neurons(layers[position], config) for position in sorted(layers)]
    both = zip(*ranked, strict=True)
    scores, protected = (torch.cat([part.to(retained.device) for part in parts]) for parts in both)
    before = sum(len(layers[position].count) for position in layers if position < measured.position)
    return select_together(scores, len(scores) * width, protected)[before + retained]
