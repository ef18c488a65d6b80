"""Measure one MoE layer on the calibration tokens: its routing, its output, and statistics of every expert."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core.layer.mixture import Routing
from ...core.layer.segments import Segments
from ...core.layer.statistics import ExpertStatistics
from ...data.labels import TokenLabels
from ...machine.processes import ALONE, Processes
from ...machine.transfers import read_together
from ...models.moe.structure import MoELayer
from ...models.moe.view import LayerWeights, read_layer
from .expert_run import ExpertRun, all_finite
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

    Where the run has kept no token, the layer has statistics only, as in `unseen_layer`.

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
    statistics = run.statistics.reduced(processes.reduce)
    reached, broken = processes.total(run.tokens) > 0, processes.reduce(run.broken.int(), "max")
    _check(layer, run.weights.segments, statistics, reached, broken)
    if not run.keep:
        return _without_tokens(layer, position, run.weights, statistics, processes)
    return MeasuredLayer(
        layer=layer,
        position=position,
        routing=run.routing,
        target=run.target,
        statistics=statistics,
        labels=labels,
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
    if statistics is None:
        experts, _, size = weights.segments.down.shape
        statistics = ExpertStatistics.zeros(experts, size)
    _check(layer, weights.segments, statistics)
    return _without_tokens(layer, position, weights, statistics, processes)


def _without_tokens(
    layer: MoELayer, position: int, weights: LayerWeights, statistics: ExpertStatistics, processes: Processes
) -> MeasuredLayer:
    segments, dtype = weights.segments, weights.segments.up.dtype
    size, device = segments.down.shape[-1], segments.down.device
    sums = {name: value.to(device) for name, value in vars(statistics).items() if isinstance(value, Tensor)}
    hidden = torch.empty(0, segments.up.shape[-1] - segments.biased, dtype=dtype, device=device)
    index = torch.empty(0, layer.top_k, dtype=torch.long, device=device)
    return MeasuredLayer(
        layer=layer,
        position=position,
        routing=Routing(hidden, index, torch.empty(0, layer.top_k, dtype=dtype, device=device)),
        target=torch.empty(0, size, dtype=segments.compute_dtype, device=device),
        statistics=replace(statistics, **sums),
        labels=TokenLabels.empty(),
        masks=(),
        block_calls=(),
        order=torch.zeros(0, dtype=torch.int64),
        router=weights.routing,
        processes=processes,
    )


def _check(
    layer: MoELayer,
    segments: Segments,
    statistics: ExpertStatistics,
    reached: bool = True,
    broken: Tensor | None = None,
) -> None:
    """Refuse a layer whose weights, inputs or outputs are no usable numbers; a GPU is asked once for all of it.

    Args:
        layer: whose experts.
        segments: their weights.
        statistics: of their outputs.
        reached: whether there is any token.
        broken: (3,) whether the inputs are not finite, outputs overflow in float16, and outputs are not finite.
    """
    weights = segments.parts
    finite = torch.stack([all_finite(part[i]) for part in weights for i in range(len(part))]).view(len(weights), -1)
    sums = [value for value in vars(statistics).values() if isinstance(value, Tensor)]
    usable = torch.stack([torch.isfinite(value).all() for value in sums]).all()
    broken = torch.zeros(3, device=finite.device) if broken is None else broken
    intact, (usable,), (largest,), (inputs, overflows, outputs) = read_together(
        finite.all(0), usable, statistics.output_max.max(), broken
    )
    if experts := [expert for expert, holds in enumerate(intact) if not holds]:
        raise ValueError(
            f"the weights of experts {experts} of {layer.name} contain NaN or infinity; where the checkpoint's own "
            "are finite, they are too large for the dtype: give bfloat16 or float32"
        )
    if not reached:
        raise ValueError(f"no calibration token reached {layer.name}; give more calibration text")
    if inputs:
        raise ValueError(f"the inputs of {layer.name} contain NaN or infinity; try another dtype, such as bfloat16")
    if overflows or (usable and largest > torch.finfo(segments.up.dtype).max):
        raise ValueError(
            f"experts of {layer.name} overflow float16 (65504) on the calibration tokens: the model itself computes "
            "infinities there; load or compress it in bfloat16 or float32 (dtype='bfloat16', --dtype bfloat16)"
        )
    if outputs or not usable:
        raise ValueError(f"the outputs of {layer.name} contain NaN or infinity; check the weights and the dtype")
