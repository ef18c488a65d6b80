"""Condense some MoE layers of a model into dense ones, in memory (CD-MoE, arXiv 2412.00069).

In a condensed layer every token gets the shared experts and a few routed ones with fixed weights; there is no router
any more, and the layer is an ordinary dense one of the model's family.  Both the experts of a layer and the layers are
found by greedy searches (`core.merging.condense`, `condensing.layer_search`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.batches import check_masks
from ..core.layer.mixture import Routing, routed_output
from ..core.layer.segments import Segments
from ..core.merging.condense import condense_experts, mean_weights
from ..core.refits.down_projections import refit_down
from ..data.labels import label_tokens, model_inputs
from ..engine.measure.beside import output_beside
from ..engine.measure.expert_run import measured_experts
from ..engine.measure.measured import MeasuredLayer
from ..engine.measure.measuring import measure_layer
from ..machine.progress import progress_bar
from ..machine.torch_state import evaluation_mode
from ..models.forward import run_until_stopped
from ..models.moe.structure import MoELayer, find_decoder_layers, find_moe_layers, layers_by_position
from ..models.moe.view import layer_activation
from ..models.refusals import check_materialised, check_model
from .dense_form import dense_form, possible_layers, which_dense
from .dense_network import check_condensable, fill_, joined_neurons, shared_experts
from .layer_search import search_layers


__all__ = ["CondensedLayer", "condense_layers"]

SAME = 0.02  # relative difference that rounding in bfloat16 may make
RIDGE = 1e-2  # of the refit, relative to the mean eigenvalue of the neurons' Gram matrix


@dataclass(frozen=True)
class CondensedLayer:
    """A layer that has become dense: what it consists of, and how close it is to what it was."""

    layer: int  # index of the decoder layer
    experts: list[int]  # routed experts in it, in the order in which they were chosen
    weights: list[float]  # of their outputs, before a refit
    error: float  # relative squared error of the block's output on held-out tokens
    refitted: bool  # whether the down projection is the refitted one
    divergence: float = 0.0  # of the model's last hidden states, with this layer and those before it condensed


@torch.no_grad()
def condense_layers(
    model: nn.Module, batches: Sequence[dict], num_layers: int, num_experts: int, refit: bool = True
) -> list[CondensedLayer]:
    """Condense the MoE layers of a model in memory whose condensation changes it least.

    Args:
        model: a causal language model of a family that has dense layers, too.
        batches: calibration batches, `input_ids` and `attention_mask`, as `data.batches.load_batches` makes them.
        num_layers: how many layers become dense.
        num_experts: routed experts in each of them; 0 for the shared ones alone.
        refit: fit the down projections to the blocks' original outputs (ridge regression), where that lowers the
            error on held-out tokens.

    Returns:
        The condensed layers, in the order in which they were chosen.  The model's modules and config have changed;
        `save_pretrained` writes an ordinary checkpoint.

    Raises:
        ValueError: a model whose layers cannot be dense ones, or numbers out of range; before any work.
    """
    layers = find_moe_layers(model)
    check_model(model, layers)
    check_materialised(layers)
    check_masks(batches)
    at = layers_by_position(model, layers)
    networks = _networks(model, at, num_layers, num_experts)
    found: dict[int, CondensedLayer] = {}
    with evaluation_mode(model):
        for position in progress_bar(sorted(networks), "Condensing layers"):
            neurons, found[position] = _condensed(_measure(model, at[position], position, batches), num_experts, refit)
            fill_(networks[position], neurons, at[position])
        last = find_decoder_layers(model, layers[0])[1][-1]
        dense = {position: (at[position].name, network) for position, network in networks.items()}
        chosen = search_layers(model, last, batches, dense, num_layers, lambda before: possible_layers(at, before))
    _write_(model, at, {position: networks[position] for position in chosen.positions})
    return [replace(found[p], divergence=d) for p, d in zip(*chosen, strict=True)]


def _networks(model: nn.Module, at: Mapping[int, MoELayer], num_layers: int, num_experts: int) -> dict[int, nn.Module]:
    """Make the empty dense networks, on the meta device, of all layers that may be condensed."""
    first = at[min(at)]
    if not 1 <= num_layers <= len(at):
        raise ValueError(f"num_layers={num_layers}, but the model has {len(at)} MoE layers; give 1 to {len(at)}")
    shared = shared_experts(first)
    least = 0 if shared is not None else 1
    if not least <= num_experts <= first.num_experts:
        without = "" if shared is not None else ", and no shared ones"
        raise ValueError(
            f"num_experts={num_experts}, but each layer has {first.num_experts} routed experts{without}; give {least} "
            f"to {first.num_experts}"
        )
    positions = possible_layers(at)
    if not positions:
        raise ValueError(
            f"a config of {first.config.model_type} cannot say that a layer is dense, so that no plain checkpoint "
            f"holds condensed ones; method='cd_moe' with num_experts={first.top_k} keeps their form and condenses all"
        )
    while len(positions) < num_layers:  # only one can be next: dense layers come first
        positions += possible_layers(at, positions)
    width = num_experts * first.width + (0 if shared is None else len(shared.gate_proj.weight))
    networks = dense_form(model, at, positions, width)[1]
    for position, network in networks.items():
        check_condensable(at[position], network)
    return networks


def _measure(model: nn.Module, layer: MoELayer, position: int, batches: Sequence[dict]) -> MeasuredLayer:
    """Run the original model up to a layer, and measure that."""
    masks = [batch["attention_mask"].bool() for batch in batches]
    with measured_experts(layer, masks, stop=True) as run:
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in model_inputs(batch).items()}
            run_until_stopped(model, **inputs, use_cache=False)
    return measure_layer(layer, position, run, masks, label_tokens(batches))


def _condensed(measured: MeasuredLayer, num_experts: int, refit: bool) -> tuple[Segments, CondensedLayer]:
    """Choose a layer's experts, and return the neurons of the dense network with what becomes of the layer."""
    layer, held_out = measured.layer, measured.labels.held_out_on(measured.target.device)
    observed = replace(measured.observe(held_out), beside=output_beside(measured))
    chosen, weights = condense_experts(observed, num_experts), mean_weights(observed)
    neurons, target = joined_neurons(layer, chosen, weights), observed.target + observed.beside
    routing = _to_one(measured.routing.hidden)
    if shared_experts(layer) is not None:
        _check_shared(layer, joined_neurons(layer, [], weights), routing, observed.beside)
    errors = [_error(neurons, routing, target, layer, held_out)]
    if refit:
        fitted = routing.select(~held_out), target[~held_out], layer_activation(layer)
        (refitted,) = refit_down(neurons, *fitted, ridges=(RIDGE,), sweeps=1)
        errors.append(_error(refitted, routing, target, layer, held_out))
    better = errors[-1] < errors[0]
    kept = [weights[expert].item() for expert in chosen]
    described = CondensedLayer(measured.position, chosen, kept, min(errors), better)
    return refitted if better else neurons, described


def _to_one(hidden: Tensor) -> Routing:
    """Route all tokens (T, d) to a single expert, with weight 1."""
    return Routing(hidden, torch.zeros_like(hidden[:, :1], dtype=torch.long), torch.ones_like(hidden[:, :1]))


def _check_shared(layer: MoELayer, shared: Segments, routing: Routing, beside: Tensor) -> None:
    """Refuse a block that does not add its shared experts' output as it is."""
    output = routed_output(shared, routing, layer_activation(layer))
    if (output - beside).norm() > SAME * beside.norm():
        raise ValueError(
            f"{layer.name} cannot become a dense layer: it does not add the output of its shared experts as it is"
        )


def _error(neurons: Segments, routing: Routing, target: Tensor, layer: MoELayer, tokens: Tensor) -> float:
    """Return the relative squared error of one expert's output for some tokens."""
    output = routed_output(neurons, routing.select(tokens), layer_activation(layer))
    squares = ((output - target[tokens]).double().square().sum(), target[tokens].double().square().sum())
    return (squares[0] / squares[1].clamp(min=1e-30)).item()


def _write_(model: nn.Module, at: Mapping[int, MoELayer], networks: Mapping[int, nn.Module]) -> None:
    """Put dense networks in the place of MoE blocks, and say so in the config."""
    config: Any = at[min(at)].config
    width = len(next(iter(networks.values())).gate_proj.weight)
    for key, value in (which_dense(config, [*networks]) | {"intermediate_size": width}).items():
        setattr(config, key, value)
    for position, network in networks.items():
        model.set_submodule(at[position].name, network)
