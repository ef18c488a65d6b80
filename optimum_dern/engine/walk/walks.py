"""`Walk`: hidden states that pass through the decoder, and the recipes whose layers are compressed on them.

Recipes with oneshot calibration share one walk through the original layers, and the measurements on it.  Every recipe
with sequential calibration has a walk of its own, through the layers compressed for it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ...core.criteria.registry import CRITERIA
from ...core.layer.statistics import ExpertStatistics
from ...core.neurons.statistics import NeuronStatistics
from ...data.labels import TokenLabels
from ...machine.allocator import return_free_memory
from ...machine.processes import Processes
from ...models.moe.original import original_kept
from ...models.moe.overrides import takes_routing
from ...models.moe.structure import MoELayer
from ..layer.compression import compress_layer_
from ..layer.needs import why_tokens
from ..measure.expert_run import chunked_experts, measured_experts
from ..measure.measured import KeptNeurons, MeasuredLayer
from ..measure.measuring import measure_layer
from ..measure.residual import record_residual
from .calls import Call, own_containers
from .drift import measure_drift
from .recipe import Recipe
from .stream import HiddenStream


__all__ = ["LayerProvider", "LayersInMemory", "Pass", "Walk", "compress_for", "open_walks", "pass_layer"]


class LayerProvider(Protocol):
    """Source of the original weights: a model in memory, or a checkpoint on disk."""

    def outside(self, head: bool = False) -> AbstractContextManager:
        """Load what is outside the decoder layers, such as embeddings, and with `head` the output head, too."""

    def loaded(self, position: int) -> AbstractContextManager:
        """Load the original decoder layer at a position while the context is open."""


class LayersInMemory:
    """Provider of the layers of a model that is completely in memory."""

    def outside(self, head: bool = False) -> AbstractContextManager:
        """Do nothing: the weights are in memory."""
        return nullcontext()

    def loaded(self, position: int) -> AbstractContextManager:
        """Do nothing: the weights are in memory."""
        return nullcontext()


@dataclass(frozen=True, eq=False)
class Walk:
    """Hidden states that pass through the decoder layers, and the recipes whose layers are compressed on them."""

    stream: HiddenStream
    recipes: Sequence[Recipe]
    sequential: bool  # runs the compressed layers, those of its only recipe
    original: HiddenStream | None = None  # through the original layers, where the recipe corrects drift

    def waiting(self, position: int) -> list[Recipe]:
        """Return the recipes that have not finished a layer."""
        return [recipe for recipe in self.recipes if position not in recipe.sink.finished]


@dataclass(frozen=True)
class Pass:
    """What all walks of one pass have in common."""

    masks: Sequence[Tensor]  # per micro-batch of this process, which tokens are real
    labels: TokenLabels  # of the T real tokens
    processes: Processes
    shared: bool  # whether the original layers are restored, for other recipes or because a sink demands it
    keep_statistics: Callable[[int, ExpertStatistics], None] | None
    neurons: Mapping[str, Mapping[int, NeuronStatistics]]  # by loss and position, for importance by gradients
    kept_neurons: KeptNeurons  # where the neurons of all layers share one budget


def open_walks(
    calls: list[list[Call]], recipes: Sequence[Recipe], spill: Path | None, device: torch.device
) -> list[Walk]:
    """Make one walk through the original layers for all oneshot recipes, then one for each sequential recipe."""
    oneshot = [recipe for recipe in recipes if recipe.config.calibration_order == "oneshot"]
    walks = []
    if oneshot or any(recipe.config.corrects_drift for recipe in recipes):
        walks.append(Walk(HiddenStream(own_containers(calls), spill, device), oneshot, sequential=False))
    for recipe in (recipe for recipe in recipes if recipe not in oneshot):
        original = walks[0].stream if recipe.config.corrects_drift else None
        walks.append(Walk(HiddenStream(own_containers(calls), spill, device), [recipe], True, original))
    return walks


def pass_layer(
    position: int,
    decoder_layer: nn.Module,
    layer: MoELayer | None,
    walks: Sequence[Walk],
    provider: LayerProvider,
    common: Pass,
) -> None:
    """Take every walk through one decoder layer, compressing it for the recipes that have not finished it."""
    ahead = [walk for walk in walks if walk.sequential and layer is not None and not walk.waiting(position)]
    for walk in ahead:
        with walk.recipes[0].sink.loaded(position), chunked_experts(layer):
            walk.stream.step(position, decoder_layer)
    if len(ahead) == len(walks):
        return
    with provider.loaded(position):
        for walk in walks:
            if walk in ahead:
                continue
            if layer is not None and walk.waiting(position):
                _measure_and_compress(walk, position, decoder_layer, layer, common)
                continue
            with _unmeasured(walk, layer, common.masks):
                walk.stream.step(position, decoder_layer)
            for recipe in walk.waiting(position):
                recipe.sink.finish(position, None)


def _unmeasured(walk: Walk, layer: MoELayer | None, masks: Sequence[Tensor]) -> AbstractContextManager:
    """Run the experts of a layer as the run does that measures it, so that a resumed walk hands on the same bits."""
    if layer is None:
        return nullcontext()
    return measured_experts(layer, masks, keep=False) if walk.recipes else chunked_experts(layer)


def _measure_and_compress(walk: Walk, position: int, decoder_layer: nn.Module, layer: MoELayer, common: Pass) -> None:
    started, recipes = time.perf_counter(), walk.waiting(position)
    measured = _measure(walk, position, decoder_layer, layer, common)
    return_free_memory()  # of the forward pass, before experts are copied
    if common.keep_statistics is not None and not walk.sequential:
        common.keep_statistics(position, measured.statistics)
    seconds = time.perf_counter() - started
    behind = decoder_layer if walk.sequential else None
    for recipe in recipes:
        compress_for(measured, recipe, common.shared, walk.stream, behind, seconds)
    return_free_memory()  # before the next layer is loaded


def _measure(walk: Walk, position: int, decoder_layer: nn.Module, layer: MoELayer, common: Pass) -> MeasuredLayer:
    """Run and measure a MoE layer; a walk through the original layers then moves on to the next one."""
    recipes = walk.waiting(position)
    needs_residual = any(CRITERIA[recipe.config.selection].needs == "residual" for recipe in recipes)
    with ExitStack() as stack:  # hooks, the last of which may end the forward pass
        residual = stack.enter_context(record_residual(decoder_layer, layer)) if needs_residual else None
        drifts = walk.original is not None and takes_routing(layer.experts)
        stops = walk.sequential and not drifts
        keep = any(why_tokens(recipe.config) is not None for recipe in recipes)
        run = stack.enter_context(measured_experts(layer, common.masks, stops, keep))
        drift = None
        if drifts:
            streams = walk.stream, walk.original
            drift = measure_drift(position, decoder_layer, layer, *streams, run, common.masks, common.processes)
        else:
            (walk.stream.probe if stops else walk.stream.step)(position, decoder_layer)
    measured = measure_layer(layer, position, run, common.masks, common.labels, common.processes)
    measured = replace(measured, neurons=common.neurons, kept_neurons=common.kept_neurons)
    if drift is not None:
        measured = replace(measured, goal=drift.goal(recipes[0].config.drift_correction))
    return measured if residual is None else replace(measured, residual=residual.without_padding(common.masks))


def compress_for(
    measured: MeasuredLayer,
    recipe: Recipe,
    shared: bool,
    stream: HiddenStream | None = None,
    behind: nn.Module | None = None,
    measuring: float = 0.0,
) -> None:
    """Compress one layer for one recipe, and pass it to the recipe's sink.

    Args:
        measured: the layer.
        recipe: config, expert count and sink.
        shared: restore the original experts afterwards.
        stream: hidden states before the layer, where `behind` is given.
        behind: the decoder layer, to run on them once it is compressed; None with oneshot calibration.
        measuring: seconds that the measurement took.
    """
    started, position = time.perf_counter() - measuring, measured.position
    with original_kept(measured.layer) if shared else nullcontext():
        earlier = [report for report in recipe.reports if report.layer < position]
        report = compress_layer_(measured, recipe.config, recipe.num_experts, started, earlier)
        if behind is not None:
            with chunked_experts(measured.layer):
                stream.step(position, behind)
        recipe.sink.finish(position, report)
