"""Measure one MoE layer on the calibration tokens: its routing, its output, and statistics of every expert."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core.layer.mixture import Routing
from ...core.layer.reduction import any_process
from ...core.layer.segments import Segments
from ...core.layer.statistics import ExpertStatistics
from ...data.labels import TokenLabels
from ...machine.processes import ALONE, Processes
from ...models.moe.structure import MoELayer
from ...models.moe.view import read_layer
from .expert_run import ExpertRun
from .measured import MeasuredLayer


__all__ = ["measure_layer", "unseen_layer"]


@torch.no_grad()
def measure_layer(
    layer: MoELayer,
    position: int,
    run: ExpertRun,
    masks: Sequence[Tensor],
    labels: TokenLabels,
    processes: Processes = ALONE,
) -> MeasuredLayer:
    """Check what a run of a MoE layer's original experts has measured, over all processes.

    Args:
        layer: with its original experts, in memory.
        position: index of its decoder layer.
        run: of its experts, on all micro-batches.
        masks: per micro-batch, (batch, sequence) bool, True for a real token.
        labels: of the T real tokens.
        processes: that share the tokens.

    Raises:
        ValueError: no token reached the layer; weights, inputs or outputs are not finite, or overflow its dtype.
    """
    segments = run.weights.segments
    _check_weights(layer, segments)
    _check_inputs(layer, run.routing, processes)
    statistics = run.statistics.reduced(processes.reduce)
    if any_process(run.overflows, processes.reduce):
        raise ValueError(_overflow(layer))
    _check_range(layer, segments, statistics)
    if any_process(~_finite(run.target), processes.reduce):
        raise ValueError(f"the outputs of {layer.name} contain NaN or infinity; check the weights and the dtype")
    return MeasuredLayer(
        layer=layer,
        position=position,
        routing=run.routing,
        target=run.target,
        statistics=statistics,
        labels=labels.on(run.target.device),
        masks=masks,
        block_calls=tuple(run.block_calls),
        order=labels.order,
        router=run.weights.routing,
        processes=processes,
    )


def unseen_layer(
    layer: MoELayer, position: int, statistics: ExpertStatistics | None = None, processes: Processes = ALONE
) -> MeasuredLayer:
    """Make a `MeasuredLayer` without calibration tokens, for methods and criteria that need none.

    Args:
        layer: in memory.
        position: index of its decoder layer.
        statistics: recorded by an earlier run; zeros by default.
        processes: that share the work.

    Raises:
        ValueError: weights or statistics that are not finite.
    """
    weights = read_layer(layer)
    segments = weights.segments
    _check_weights(layer, segments)
    (experts, _, size), device = segments.down.shape, segments.down.device
    if statistics is None:
        statistics = ExpertStatistics.zeros(experts, size)
    _check_range(layer, segments, statistics)
    sums = {name: value.to(device) for name, value in vars(statistics).items() if isinstance(value, Tensor)}
    hidden = torch.empty(0, segments.up.shape[-1] - segments.biased, dtype=segments.up.dtype, device=device)
    index = torch.empty(0, layer.top_k, dtype=torch.long, device=device)
    return MeasuredLayer(
        layer=layer,
        position=position,
        routing=Routing(hidden, index, torch.empty(0, layer.top_k, dtype=segments.up.dtype, device=device)),
        target=torch.empty(0, size, dtype=segments.compute_dtype, device=device),
        statistics=replace(statistics, **sums),
        labels=TokenLabels.empty().on(device),
        masks=(),
        block_calls=(),
        order=torch.zeros(0, dtype=torch.int64),
        router=weights.routing,
        processes=processes,
    )


def _check_inputs(layer: MoELayer, routing: Routing, processes: Processes) -> None:
    if not any_process(torch.tensor(len(routing.index) > 0, device=routing.index.device), processes.reduce):
        raise ValueError(f"no calibration token reached {layer.name}; give more calibration text")
    if any_process(~_finite(routing.hidden), processes.reduce):
        raise ValueError(f"the inputs of {layer.name} contain NaN or infinity; try another dtype, such as bfloat16")


def _check_weights(layer: MoELayer, segments: Segments) -> None:
    parts = [part for part in (segments.gate, segments.up, segments.down) if part is not None]
    finite = torch.stack([_finite(part[i]) for part in parts for i in range(len(part))])
    broken = (~finite).view(len(parts), -1).any(0).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the weights of experts {broken} of {layer.name} contain NaN or infinity; where the checkpoint's own are "
            "finite, they are too large for the dtype: give bfloat16 or float32"
        )


def _check_range(layer: MoELayer, segments: Segments, statistics: ExpertStatistics) -> None:
    """Refuse statistics that are not finite, and expert outputs that overflow the layer's dtype."""
    sums = [value for value in vars(statistics).values() if isinstance(value, Tensor)]
    if not torch.stack([torch.isfinite(value).all() for value in sums]).all():
        raise ValueError(f"the outputs of {layer.name} contain NaN or infinity; check the weights and the dtype")
    if statistics.output_max.max() > torch.finfo(segments.up.dtype).max:
        raise ValueError(_overflow(layer))


def _finite(values: Tensor) -> Tensor:
    """Return whether all values are finite, from their smallest and largest: no array of booleans is made."""
    return torch.stack(values.aminmax()).isfinite().all() if values.numel() else values.isfinite().all()


def _overflow(layer: MoELayer) -> str:
    return (
        f"experts of {layer.name} overflow float16 (65504) on the calibration tokens: the model itself computes "
        "infinities there; load or compress it in bfloat16 or float32 (dtype='bfloat16', --dtype bfloat16)"
    )
