"""Operations of making layers dense, and the memory of the search that chooses them, from tensor shapes alone.

A run with `condensed_layers` is one pass through the original decoder, in which every layer that may become dense is
condensed, and where a search chooses among them, one pass more for each that is chosen (`condensing.layer_search`).
In such a pass the model of every trial has hidden states of its own from the layer that it tries on.  Which layers are
chosen is not known before: each is taken to be as likely.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ...condensing.dense_form import possible_layers
from ...condensing.layer_search import SEARCHED
from ...condensing.plan import CondensingPlan, plan_condensing
from ...config import DernConfig
from ...core.layer.cost import LayerShape, experts_operations, held_by_chunk
from ...models.moe.structure import MoELayer, find_decoder_layers
from .phases import layer_phases, layer_shape, pass_tokens, result_shape


__all__ = ["SearchMemory", "condensing_operations", "network_bytes", "plan_of", "search_memory"]

COMPARED = 8  # float32 numbers a hidden unit while two outputs are compared: log-softmax of both, mean and divergences


class SearchMemory(NamedTuple):
    """Bytes that the search has in memory beside a decoder layer."""

    network: int  # the dense network of a layer
    forward: int  # a micro-batch in the layer or in the network, or two outputs that are compared
    hidden: int  # hidden states: what enters the decoder, of the original model, and of all trials
    kept: int  # the part of them that stays in memory where hidden states are in files


class Tried(NamedTuple):
    """How likely each layer is tried in a pass of the search, and how likely it is condensed already."""

    trials: Mapping[int, float]
    chosen: Mapping[int, float]


def plan_of(model: nn.Module, layers: Sequence[MoELayer], config: DernConfig) -> CondensingPlan | None:
    """Plan which layers may become dense; None for a config that makes no layer dense."""
    if config.condensed_layers is None:
        return None
    return plan_condensing(model, layers, config.condensed_layers, config.num_experts)


def network_bytes(plan: CondensingPlan) -> list[int]:
    """Return the bytes of the dense network of each layer that may become dense."""
    size = plan.at[min(plan.at)].experts.down_proj.element_size()
    return [size * sum(p.numel() for p in network.parameters()) for network in plan.networks.values()]


def condensing_operations(model: nn.Module, layers: Sequence[MoELayer], tokens: int, config: DernConfig) -> float:
    """Count the operations of condensing layers and of the search among them; a multiply-add counts as two.

    Args:
        model: its weights need not be loaded.
        layers: its MoE layers.
        tokens: number of calibration tokens.
        config: with `condensed_layers`.
    """
    plan = plan_of(model, layers, config)
    steps = _steps(model, plan, tokens)
    operations = 0.0
    for position in range(max(plan.networks) + 1):
        operations += steps[position].original
        if position in plan.networks:
            _, *phases = layer_phases(result_shape(plan.at[position], tokens, config, 1), config)  # it has run
            operations += sum(phase.operations for phase in phases)
    return operations + (_search_operations(model, plan, searched_tokens(tokens, config)) if plan.searched else 0.0)


def searched_tokens(tokens: int, config: DernConfig) -> int:
    """Return how many of some calibration tokens the search compares models on: whole sequences of them."""
    return min(tokens, -(-SEARCHED // config.sequence_length) * config.sequence_length)


def search_memory(model: nn.Module, plan: CondensingPlan, tokens: int, config: DernConfig) -> SearchMemory:
    """Predict the memory of the search for the layers to condense.

    Args:
        model: its weights need not be loaded.
        plan: whose layers are searched.
        tokens: number of calibration tokens.
        config: with the sizes of batches.
    """
    layer, searched = plan.at[min(plan.at)], searched_tokens(tokens, config)
    shape = layer_shape(layer, min(searched, pass_tokens(tokens, config)), layer.num_experts)
    row = model.config.get_text_config().hidden_size * model.dtype.itemsize
    streams = max(2 + sum(tried.trials.values()) + bool(number) for number, tried in enumerate(_passes(plan)))
    width = max(len(network.get_parameter("gate_proj.weight")) for network in plan.networks.values())
    forward = shape.tokens * (2 * shape.itemsize + shape.number) * shape.outputs
    run = max(
        forward + held_by_chunk(shape),
        forward + 3 * shape.itemsize * shape.tokens * width,  # the network runs a micro-batch as a whole
        4 * COMPARED * shape.tokens * shape.outputs,
    )
    return SearchMemory(max(network_bytes(plan)), run, round(streams) * searched * row, 2 * searched * row)


class Step(NamedTuple):
    """Operations of one decoder layer on all tokens."""

    original: float
    condensed: float  # where its dense network takes the place of its block


def _steps(model: nn.Module, plan: CondensingPlan, tokens: int) -> list[Step]:
    """Return the operations of every decoder layer on some tokens; the products of attention scores are left out."""
    _, decoder_layers = find_decoder_layers(model, plan.at[min(plan.at)])
    steps = []
    for position, decoder_layer in enumerate(decoder_layers):
        layer, network = plan.at.get(position), plan.networks.get(position)
        whole = _weights(decoder_layer)
        if layer is None:
            steps.append(Step(2.0 * tokens * whole, 0.0))
            continue
        beside = 2.0 * tokens * (whole - _weights(layer.experts))  # attention, the router, shared experts
        around = whole - _weights(layer.block)
        condensed = 0.0 if network is None else 2.0 * tokens * (around + _weights(network))
        steps.append(Step(beside + experts_operations(_shape(layer, tokens)), condensed))
    return steps


def _search_operations(model: nn.Module, plan: CondensingPlan, tokens: int) -> float:
    """Return the operations of all passes of the search."""
    steps, operations = _steps(model, plan, tokens), 0.0
    for tried in _passes(plan):
        streams = 1.0  # the model so far; each trial adds one
        for position, step in enumerate(steps):
            trial, chosen = tried.trials.get(position, 0.0), tried.chosen.get(position, 0.0)
            operations += streams * ((1 - chosen) * step.original + chosen * step.condensed) + trial * step.condensed
            streams += trial
    return operations


def _passes(plan: CondensingPlan) -> Iterator[Tried]:
    """Yield what each pass of the search tries: all layers that are left, or where they come in order the next one."""
    positions = sorted(plan.networks)
    ordered = len(possible_layers(plan.at)) < len(positions)
    for number in range(plan.num_layers):
        if ordered:
            yield Tried({positions[number]: 1.0}, dict.fromkeys(positions[:number], 1.0))
        else:
            share = number / len(positions)
            yield Tried(dict.fromkeys(positions, 1 - share), dict.fromkeys(positions, share))


def _shape(layer: MoELayer, tokens: int) -> LayerShape:
    return layer_shape(layer, tokens, layer.num_experts)


def _weights(module: nn.Module) -> int:
    """Return how many weights of a module are in matrices."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)
