"""Condense one measured MoE layer: choose its experts, join their neurons, and fit their down projections."""

import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DernConfig
from ..core.layer.mixture import Routing, routed_output
from ..core.layer.reduction import Reduce
from ..core.layer.segments import Segments
from ..core.merging.condense import condense_experts, mean_weights
from ..core.refits.down_projections import refit_down
from ..engine.layer.steps import RIDGE
from ..engine.measure.beside import output_beside
from ..engine.measure.measured import MeasuredLayer
from ..models.moe.structure import MoELayer
from ..models.moe.view import layer_activation
from ..results.report import LayerReport
from .dense_network import joined_neurons, shared_experts


__all__ = ["Fit", "condense_layer"]

SAME = 0.02  # relative difference that rounding in bfloat16 may make


class Fit(NamedTuple):
    """Whether and how the down projections of condensed layers are fitted."""

    refit: bool = True  # to the blocks' original outputs (ridge regression)
    guard: bool = True  # only where that lowers the error on held-out tokens
    ridge: float = RIDGE  # relative to the mean eigenvalue of the neurons' Gram matrix

    @classmethod
    def of(cls, config: DernConfig) -> "Fit":
        """Make what a config asks for."""
        return cls(config.refit, config.guard, config.refit_ridge or RIDGE)


@torch.no_grad()
def condense_layer(
    measured: MeasuredLayer, num_experts: int, fit: Fit, started: float
) -> tuple[Segments, LayerReport]:
    """Condense one MoE layer, which stays as it is.

    Args:
        measured: the layer with its inputs and outputs on the calibration tokens.
        num_experts: routed experts that it consists of, beside the shared ones.
        fit: whether and how its down projections are fitted.
        started: when the work on the layer began, by `time.perf_counter`.

    Returns:
        The neurons of the dense network, and the report of the layer.

    Raises:
        ValueError: a block that does not add its shared experts' output as it is.
    """
    layer, statistics, processes = measured.layer, measured.statistics, measured.processes
    held_out = measured.labels.held_out_on(measured.target.device) & fit.guard
    observed = replace(measured.observe(held_out), beside=output_beside(measured))
    chosen, weights = condense_experts(observed, num_experts), mean_weights(observed)
    neurons, target = joined_neurons(layer, chosen, weights), observed.target + observed.beside
    routing = _to_one(measured.routing.hidden)
    if shared_experts(layer) is not None:
        _check_shared(layer, joined_neurons(layer, [], weights), routing, observed.beside, processes.reduce)
    made = {"condensed": neurons}
    if fit.refit:
        fitted = routing.select(~held_out), target[~held_out], layer_activation(layer)
        (made["condensed+refit"],) = refit_down(neurons, *fitted, (fit.ridge,), 1, processes.reduce)
    judged = made if fit.guard else {}
    errors = {name: _error(one, routing, target, layer, held_out, processes.reduce) for name, one in judged.items()}
    winner = min(errors, key=errors.get) if errors else [*made][-1]  # of equals the first
    return made[winner], LayerReport(
        name=layer.name,
        layer=measured.position,
        tokens=statistics.tokens,
        held_out_tokens=processes.total(int(held_out.sum())),
        load=(statistics.count / statistics.count.sum().clamp(min=1)).tolist(),
        saliency=weights.tolist(),
        retained=chosen,
        errors=errors,
        winner=winner,
        moved_share=None,
        similarity_quantiles=None,
        largest_output=statistics.output_max.max().item(),
        dense=True,
        seconds=time.perf_counter() - started,
    )


def _to_one(hidden: Tensor) -> Routing:
    """Route all tokens (T, d) to a single expert, with weight 1."""
    return Routing(hidden, torch.zeros_like(hidden[:, :1], dtype=torch.long), torch.ones_like(hidden[:, :1]))


def _check_shared(layer: MoELayer, shared: Segments, routing: Routing, beside: Tensor, reduce: Reduce) -> None:
    """Refuse a block that does not add its shared experts' output as it is."""
    output = routed_output(shared, routing, layer_activation(layer))
    if _relative_square(output, beside, reduce) > SAME**2:
        raise ValueError(
            f"{layer.name} cannot become a dense layer: it does not add the output of its shared experts as it is"
        )


def _error(
    neurons: Segments, routing: Routing, target: Tensor, layer: MoELayer, tokens: Tensor, reduce: Reduce
) -> float:
    """Return the relative squared error of one expert's output for some tokens."""
    output = routed_output(neurons, routing.select(tokens), layer_activation(layer))
    return _relative_square(output, target[tokens], reduce)


def _relative_square(output: Tensor, target: Tensor, reduce: Reduce) -> float:
    """Return |output - target|^2 / |target|^2 over the tokens of all processes."""
    squares = torch.stack([(output - target).double().square().sum(), target.double().square().sum()])
    error, whole = reduce(squares)
    return (error / whole.clamp(min=1e-30)).item()
