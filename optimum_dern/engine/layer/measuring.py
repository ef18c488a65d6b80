"""Measure one MoE layer on the calibration tokens: its routing, its output, and sums per expert."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...calibration.recording import RoutingRecord
from ...core.mixture import Routing
from ...core.reduction import any_process
from ...core.statistics import ExpertStatistics, measure_experts
from ...models.structure import MoELayer
from ...models.view import layer_activation, read_layer
from ..distributed import ALONE, Processes
from .measured import MeasuredLayer
from .token_order import token_order


__all__ = ["measure_layer", "unseen_layer"]


@torch.no_grad()
def measure_layer(
    layer: MoELayer,
    position: int,
    record: RoutingRecord,
    masks: Sequence[Tensor],
    held_out: Tensor,
    processes: Processes = ALONE,
) -> MeasuredLayer:
    """Measure a layer as it is.

    Args:
        layer: with its original experts, in memory.
        position: of its decoder layer.
        record: of its calls.
        masks: per micro-batch, (batch, sequence) bool, True for a real token.
        held_out: (T,) bool over the real tokens.
        processes: that share the tokens.

    Raises:
        ValueError: no token reached the layer, or something is not finite.
    """
    routing = record.without_padding(masks)
    _check_inputs(layer, routing, processes)
    weights = read_layer(layer)
    statistics, target = measure_experts(weights.segments, routing, layer_activation(layer))
    if any_process(~torch.isfinite(target).all(), processes.reduce):
        raise ValueError(f"the outputs of {layer.name} contain NaN or infinity; check the weights and the dtype")
    return MeasuredLayer(
        layer=layer,
        position=position,
        routing=routing,
        target=target,
        statistics=statistics.reduced(processes.reduce),
        held_out=held_out,
        masks=masks,
        block_calls=tuple(record.block_calls),
        order=token_order(masks, processes),
        router=weights.routing,
        processes=processes,
    )


def unseen_layer(
    layer: MoELayer, position: int, statistics: ExpertStatistics | None = None, processes: Processes = ALONE
) -> MeasuredLayer:
    """A layer of which no token is at hand, for what needs none.

    Args:
        layer: in memory.
        position: of its decoder layer.
        statistics: of an earlier run; zeros by default.
        processes: that share the work.
    """
    weights = read_layer(layer)
    segments = weights.segments
    (experts, _, size), device = segments.down.shape, segments.down.device
    if statistics is None:
        statistics = ExpertStatistics.zeros(experts, size)
    sums = {name: value.to(device) for name, value in vars(statistics).items() if isinstance(value, Tensor)}
    hidden = torch.empty(0, segments.up.shape[-1] - segments.biased, dtype=segments.up.dtype, device=device)
    index = torch.empty(0, layer.top_k, dtype=torch.long, device=device)
    return MeasuredLayer(
        layer=layer,
        position=position,
        routing=Routing(hidden, index, torch.empty(0, layer.top_k, dtype=segments.up.dtype, device=device)),
        target=torch.empty(0, size, dtype=segments.compute_dtype, device=device),
        statistics=replace(statistics, **sums),
        held_out=torch.empty(0, dtype=torch.bool, device=device),
        masks=(),
        block_calls=(),
        order=torch.zeros(0, dtype=torch.int64),
        router=weights.routing,
        processes=processes,
    )


def _check_inputs(layer: MoELayer, routing: Routing, processes: Processes) -> None:
    if not any_process(torch.tensor(len(routing.index) > 0, device=routing.index.device), processes.reduce):
        raise ValueError(f"no calibration token reached {layer.name}; give more calibration text")
    if any_process(~torch.isfinite(routing.hidden).all(), processes.reduce):
        raise ValueError(f"the inputs of {layer.name} contain NaN or infinity; try another dtype, such as bfloat16")
