"""What the calibration tokens show of one MoE layer: how it routes them, what comes out, sums per expert."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.recording import RoutingRecord
from ..core.mixture import Routing
from ..core.reduction import any_process
from ..core.statistics import ExpertStatistics, measure_experts
from ..models.structure import MoELayer
from ..models.view import layer_activation, read_layer
from .distributed import ALONE, Processes
from .rewriting import LayerData


__all__ = ["measure_layer", "unseen_layer"]


@torch.no_grad()
def measure_layer(
    layer: MoELayer,
    record: RoutingRecord,
    masks: Sequence[Tensor],
    held_out: Tensor,
    processes: Processes = ALONE,
) -> LayerData:
    """Measure a layer as it is.

    Args:
        layer: with its original experts, in memory.
        record: of its calls.
        masks: per micro-batch, (batch, sequence) bool, True for a real token.
        held_out: (T,) bool over the real tokens.
        processes: that share the tokens.

    Raises:
        ValueError: no token reached the layer, or something is not finite.
    """
    routing = record.without_padding(masks)
    _check_inputs(layer, routing, processes)
    statistics, target = measure_experts(read_layer(layer).segments, routing, layer_activation(layer))
    if any_process(~torch.isfinite(target).all(), processes.reduce):
        raise ValueError(f"the outputs of {layer.name} contain NaN or infinity; check the weights and the dtype")
    return LayerData(
        layer, routing, target, statistics.reduced(processes.reduce), held_out, masks, tuple(record.block_calls)
    )


def unseen_layer(layer: MoELayer, statistics: ExpertStatistics | None = None) -> LayerData:
    """A layer of which no token is at hand, for what needs none.

    Args:
        layer: in memory.
        statistics: of an earlier run; zeros by default.
    """
    segments = read_layer(layer).segments
    (experts, _, size), device = segments.down.shape, segments.down.device
    if statistics is None:
        statistics = ExpertStatistics.zeros(experts, size)
    sums = {name: value.to(device) for name, value in vars(statistics).items() if isinstance(value, Tensor)}
    hidden = torch.empty(0, segments.up.shape[-1] - segments.biased, dtype=segments.up.dtype, device=device)
    index = torch.empty(0, layer.top_k, dtype=torch.long, device=device)
    routing = Routing(hidden, index, torch.empty(0, layer.top_k, dtype=segments.up.dtype, device=device))
    target = torch.empty(0, size, dtype=segments.compute_dtype, device=device)
    held_out = torch.empty(0, dtype=torch.bool, device=device)
    return LayerData(layer, routing, target, replace(statistics, **sums), held_out, (), ())


def _check_inputs(layer: MoELayer, routing: Routing, processes: Processes) -> None:
    if not any_process(torch.tensor(len(routing.index) > 0, device=routing.index.device), processes.reduce):
        raise ValueError(f"no calibration token reached {layer.name}; give more calibration text")
    if any_process(~torch.isfinite(routing.hidden).all(), processes.reduce):
        raise ValueError(f"the inputs of {layer.name} contain NaN or infinity; try another dtype, such as bfloat16")
