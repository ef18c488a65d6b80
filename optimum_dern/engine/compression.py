"""Compress one MoE layer from what the calibration sequences show of it."""

import time
from collections.abc import Sequence

import torch

from ..config import DernConfig
from ..core.criteria import select
from ..core.similarity_map import similarity_map
from ..methods import LayerProblem, get_method
from ..models.view import layer_activation, read_layer, release_experts_
from ..reporting.report import LayerReport
from .choice import LayerTask, choose_candidate
from .distributed import ALONE, Processes
from .positions import enough_tokens, evenly_spaced, token_positions
from .rewriting import LayerData, LayerRewriter
from .selecting import find_places, observe_layer


__all__ = ["compress_layer_"]


@torch.no_grad()
def compress_layer_(
    data: LayerData,
    config: DernConfig,
    num_experts: int,
    position: int,
    started: float,
    processes: Processes = ALONE,
    earlier: Sequence[LayerReport] = (),
) -> LayerReport:
    """Compress one MoE layer, in place: score, select, propose candidates, choose, write."""
    layer, activation = data.layer, layer_activation(data.layer)
    weights = read_layer(layer)
    statistics, target = data.statistics, data.target
    held_out = data.held_out.to(target.device) & config.guard  # without a guard nothing needs to be judged
    order = token_positions(data.masks, processes)
    observed = observe_layer(data, weights, held_out, order, processes)
    places = find_places(data, config, num_experts, position, earlier)
    scores, retained = select(config.selection, observed, places, config.seed + position)
    retained = retained.to(data.routing.index.device)
    problem = LayerProblem(observed, scores, retained, processes.map, tuple(places.protected))
    candidates = get_method(config.method).compress_layer(problem, config)

    likeness = similarity_map(weights.segments, config.similarity_weights, config.seed + position)
    paths = (entry and entry.path for entry in (layer.router_weight, layer.router_bias))
    rewriter = LayerRewriter(data, weights.routing, retained, *paths)
    del weights, observed, problem  # what nobody else holds on to need not wait for the candidates' refits
    release_experts_(layer)
    neurons = num_experts * next(iter(candidates.values())).segments.up.shape[1]
    wanted = enough_tokens(neurons, layer.top_k) if config.neuron_refit else statistics.tokens
    enough = ~held_out & evenly_spaced(order, wanted, processes).to(held_out.device)
    goal = target if data.goal is None else data.goal
    router, reroute, reduce = rewriter.router, rewriter.reroute, processes.reduce
    task = LayerTask(goal, held_out, enough, activation, router, reroute, reduce, order, data.token_weight)
    choice = choose_candidate(candidates, task, config)
    rewriter.write(choice.candidate)
    return LayerReport(
        name=layer.name,
        layer=position,
        tokens=statistics.tokens,
        held_out_tokens=int(processes.reduce(held_out.sum())),
        load=(statistics.count / statistics.count.sum().clamp(min=1)).tolist(),
        saliency=scores.tolist(),
        retained=(retained if choice.candidate.retained is None else choice.candidate.retained).tolist(),
        errors=choice.errors,
        winner=choice.name,
        moved_share=choice.facts.get("moved_share"),
        similarity_quantiles=choice.facts.get("similarity_quantiles"),
        segment_flow=choice.facts.get("segment_flow"),
        similarity_map=likeness,
        protected=sorted(places.protected),
        largest_output=statistics.output_max.max().item(),
        seconds=time.perf_counter() - started,
    )
