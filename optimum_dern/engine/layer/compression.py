"""Compress one MoE layer: select experts, let the method make candidates, fit and judge them, write the best one."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config import DernConfig
from ...core.criteria.registry import select
from ...core.criteria.selection import Places
from ...core.criteria.super_experts import find_super_experts
from ...core.pictures.similarity_map import similarity_map
from ...machine.transfers import read_together
from ...methods import Candidate, LayerProblem, get_method
from ...models.moe.view import release_experts_
from ...results.report import LayerReport
from ..measure.beside import output_beside
from ..measure.measured import MeasuredLayer
from .guard import choose_variant
from .importance import neuron_statistics, score_neurons
from .narrowing import find_width, narrow_candidates
from .objective import Objective
from .steps import sampled_tokens


__all__ = ["compress_layer_", "find_places"]


@torch.no_grad()
def compress_layer_(
    measured: MeasuredLayer,
    config: DernConfig,
    num_experts: int,
    started: float,
    earlier: Sequence[LayerReport] = (),
) -> LayerReport:
    """Compress one MoE layer, in place.

    Args:
        measured: the layer with its inputs and outputs on the calibration tokens.
        config: of the compression.
        num_experts: N, experts that the layer keeps.
        started: when the work on the layer began, by `time.perf_counter`.
        earlier: reports of the MoE layers before it.
    """
    layer, statistics = measured.layer, measured.statistics
    held_out = measured.labels.held_out & config.guard  # without a guard nothing is judged
    places = find_places(measured, config, num_experts, earlier)
    proposed = _propose(measured, config, places)
    facts = proposed.facts
    release_experts_(layer)  # frees memory before the refits, which take most
    objective = _objective(measured, held_out, num_experts * find_width(layer, config), config)
    judged = choose_variant(proposed.candidates, objective, config)
    measured.write_(judged.winner.candidate)
    load = statistics.count / statistics.count.sum().clamp(min=1)
    shown = (load, proposed.scores, judged.winner.candidate.retained, statistics.output_max.max())
    load, saliency, chosen, (largest,) = read_together(*shown)
    return LayerReport(
        name=layer.name,
        layer=measured.position,
        tokens=statistics.tokens,
        held_out_tokens=measured.processes.total(int(held_out.sum())),
        load=load,
        saliency=saliency,
        retained=[int(expert) for expert in chosen],
        errors={name: error.total for name, error in judged.errors.items()},
        source_errors=judged.source_errors(),
        winner=judged.winner.name,
        moved_share=facts.get("moved_share"),
        similarity_quantiles=facts.get("similarity_quantiles"),
        segment_flow=facts.get("segment_flow"),
        skipped={**facts.get("skipped", {}), **judged.skipped},
        similarity_map=proposed.likeness,
        protected=sorted(places.protected),
        largest_output=largest,
        widths=judged.winner.candidate.widths,
        seconds=time.perf_counter() - started,
    )


def find_places(
    measured: MeasuredLayer, config: DernConfig, num_experts: int, earlier: Sequence[LayerReport] = ()
) -> Places:
    """Determine how many experts a layer keeps, and which of them are protected from removal.

    Args:
        measured: the layer.
        config: `protect_experts` names experts, or asks for those with outlier outputs.
        num_experts: N, experts that the layer keeps.
        earlier: reports of the MoE layers before it.
    """
    layer, protected = measured.layer, config.protect_experts or {}
    if protected == "super":
        maxima = [report.largest_output for report in earlier]
        depth = measured.position / layer.config.num_hidden_layers
        found = find_super_experts(measured.statistics.output_max, maxima, depth, num_experts, layer.num_groups)
        return Places(num_experts, layer.num_groups, tuple(found))
    return Places(num_experts, layer.num_groups, tuple(protected.get(measured.position, ())))


@dataclass(frozen=True)
class Proposed:
    """A method's candidates for a layer, and what the report says of how they came about."""

    candidates: dict[str, Candidate]  # each with the indices of the experts whose router rows it keeps
    scores: Tensor  # (E,) by which experts were selected
    likeness: dict[str, object] | None  # similarity map of the original experts

    @property
    def facts(self) -> dict[str, object]:
        """What the candidates tell the report."""
        return {name: value for candidate in self.candidates.values() for name, value in candidate.facts.items()}


def _propose(measured: MeasuredLayer, config: DernConfig, places: Places) -> Proposed:
    """Select experts, and let the method make its candidates of them."""
    device, seed = measured.target.device, config.seed + measured.position
    observed = measured.observe(measured.labels.held_out_on(device) & config.guard)
    if get_method(config.method).needs_beside:
        observed = replace(observed, beside=output_beside(measured))
    likeness = similarity_map(observed.segments, config.similarity_weights, seed)  # before any copy of an expert
    scores, retained = select(config.selection, observed, places, seed)
    statistics = None if config.importance is None else neuron_statistics(measured, observed, config)
    neurons = None if statistics is None else score_neurons(statistics, config)[0]
    protected, share = tuple(places.protected), measured.processes.map
    problem = LayerProblem(observed, scores, retained.to(device), share, protected, neurons)
    candidates = {
        name: candidate if candidate.retained is not None else replace(candidate, retained=problem.retained)
        for name, candidate in get_method(config.method).compress_layer(problem, config).items()
    }
    if find_width(measured.layer, config) < measured.layer.width:
        candidates = narrow_candidates(candidates, measured, statistics, config)
    return Proposed(candidates, scores, likeness)


def _objective(measured: MeasuredLayer, held_out: Tensor, neurons: int, config: DernConfig) -> Objective:
    """Make the objective that the candidates are fitted to and judged by."""
    wanted = sampled_tokens(config, neurons, measured.layer.top_k, measured.statistics.tokens)
    return Objective(measured, held_out, wanted)
