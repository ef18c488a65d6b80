"""Compress one MoE layer from what the calibration sequences show of it."""

import time

import torch

from ..config import DernConfig
from ..core.observation import ObservedLayer
from ..core.reduction import any_process
from ..core.saliency import score_experts
from ..core.selection import select_experts
from ..core.statistics import measure_experts
from ..methods import LayerProblem, get_method
from ..models.view import layer_activation, read_layer, release_experts_, retained_routing
from ..reporting.report import LayerReport
from .choice import LayerTask, choose_candidate
from .distributed import ALONE, Processes
from .rewriting import LayerData, LayerRewriter


__all__ = ["compress_layer_"]


@torch.no_grad()
def compress_layer_(
    data: LayerData,
    config: DernConfig,
    num_experts: int,
    position: int,
    started: float,
    processes: Processes = ALONE,
) -> LayerReport:
    """Compress one MoE layer, in place: score, select, propose candidates, choose, write."""
    layer, activation = data.layer, layer_activation(data.layer)
    weights = read_layer(layer)
    statistics, target = measure_experts(weights.segments, data.routing, activation)
    if any_process(~torch.isfinite(target).all(), processes.reduce):
        raise ValueError(f"the outputs of {layer.name} contain NaN or infinity; check the weights and the dtype")
    statistics = statistics.reduced(processes.reduce)
    rows = layer.router_weight
    own_rows = rows and weights.routing[rows.path]
    held_out = data.held_out.to(target.device) & config.guard  # without a guard nothing needs to be judged
    observed = ObservedLayer(
        weights.segments, activation, data.routing, target, held_out, statistics, own_rows, processes.reduce
    )
    scores = score_experts(config.selection, statistics, config.seed + position)
    protected = (config.protect_experts or {}).get(position, [])
    retained = select_experts(scores, num_experts, layer.num_groups, protected).to(data.routing.index.device)
    candidates = get_method(config.method).compress_layer(
        LayerProblem(observed, scores, retained, processes.map), config
    )

    rewriter = LayerRewriter(data, retained_routing(layer, weights, retained), rows and rows.path)
    own_rows = rows and rewriter.routing[rows.path]
    del weights, observed  # what nobody else holds on to need not wait for the candidates' refits
    release_experts_(layer)
    task = LayerTask(target, held_out, activation, own_rows, rewriter.reroute, processes.reduce)
    choice = choose_candidate(candidates, task, config)
    rewriter.write(choice.candidate)
    return LayerReport(
        name=layer.name,
        layer=position,
        tokens=statistics.tokens,
        held_out_tokens=int(processes.reduce(held_out.sum())),
        load=(statistics.count / statistics.count.sum()).tolist(),
        saliency=scores.tolist(),
        retained=retained.tolist(),
        errors=choice.errors,
        winner=choice.name,
        moved_share=choice.facts.get("moved_share"),
        similarity_quantiles=choice.facts.get("similarity_quantiles"),
        seconds=time.perf_counter() - started,
    )
