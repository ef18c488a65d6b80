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


__all__ = [
    "find_width",
    "narrow_candidates",
    "padding_notice",
    "ranks_all_layers",
    "select_in_all_layers",
    "written_width",
]


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


def ranks_all_layers(layer: MoELayer, config: DernConfig, num_experts: int) -> bool:
    """Whether the neurons of all layers share one budget: all are measured before the first layer is compressed."""
    together = config.width_budget == "global" and num_experts == layer.num_experts
    return together and gradient_needed(config) is not None and find_width(layer, config) < layer.width


def select_in_all_layers(
    statistics: Mapping[int, NeuronStatistics], width: int, config: DernConfig
) -> dict[int, Tensor]:
    """Rank the neurons of all layers together, and choose those that stay.

    Args:
        statistics: of the neurons of every MoE layer, by position.
        width: neurons that an expert keeps on average.
        config: names the importance.

    Returns:
        By position, indices (E, f) of the neurons of each expert, then `PADDING`.
    """
    positions = sorted(statistics)
    device = statistics[positions[0]].count.device
    ranked = zip(*(score_neurons(statistics[position], config) for position in positions), strict=True)
    scores, protected = (torch.cat([part.to(device) for part in parts]) for parts in ranked)
    kept = select_together(scores, len(scores) * width, protected)
    return dict(zip(positions, kept.split([len(statistics[p].count) for p in positions]), strict=True))


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
    width = find_width(measured.layer, config)
    scores, protected = score_neurons(statistics, config)
    if config.width_budget == "uniform":
        return select_neurons(scores[retained], width, protected[retained])
    kept = measured.kept_neurons.get((config.importance, width))
    if kept is None or len(retained) < len(scores):  # what stays in later layers is not known yet
        return select_together(scores[retained], len(retained) * width, protected[retained])
    return kept[measured.position].to(retained.device)[retained]
