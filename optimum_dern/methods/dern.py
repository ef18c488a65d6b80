"""DERN (arXiv 2509.10377): recombine the neurons of dropped experts into the retained experts."""

from typing import TYPE_CHECKING

import torch

from ..core.criteria.greedy import greedy_cost, least_error_set
from ..core.dern.recombination import Recombination, recombine_layer, recombine_layer_cost
from ..core.layer.cost import Cost, LayerShape
from ..core.pictures.segment_flow import segment_flow
from ..core.router.choice import UnknownRouter
from ..core.router.rows import add_moved_rows
from .registry import Candidate, LayerProblem, register_method


if TYPE_CHECKING:
    from ..config import DernConfig

RECOMBINATION = (  # options without effect where nothing is recombined
    "similarity_threshold",
    "router_update",
    "cluster_init",
    "cluster_iterations",
    "cluster_tolerance",
    "importance_weighting",
)
FEWEST_TOKENS = 512  # on which the set of least output error is searched


@register_method("dern")
class Dern:
    """The DERN method; proposes the pruned layer and, with `recombine`, the recombined one.

    With selection="router" and the guard, a second set of retained experts, that of least output error as chosen by
    selection="greedy", is a candidate too: which set is better differs from layer to layer.
    """

    needs_tokens = False
    keeps_experts = True  # but for those recombined, which are refused where they are to be narrower
    options = ("recombine", *RECOMBINATION)

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        sets = 1 + _tries_second_set(config)
        return sets + config.recombine, sets

    def costs(self, shape: LayerShape, config: "DernConfig") -> list[Cost]:
        steps = [recombine_layer_cost(shape, config.cluster_iterations)] if config.recombine else []
        if _tries_second_set(config):
            pruned = shape.retained * shape.expert * shape.itemsize
            beside = pruned + sum(step.experts for step in steps)
            steps.append(
                greedy_cost(shape, _search_tokens(shape.tokens, shape.top_k, shape.experts))._replace(experts=beside)
            )
        return steps

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        facts: dict[str, object] = {}
        candidates = {"pruned": Candidate(problem.layer.segments.select(problem.retained), facts=facts)}
        if _tries_second_set(config):
            try:
                candidates |= _pruned_by_error(problem)
            except UnknownRouter as reason:
                facts["skipped"] = {"second set of experts": str(reason)}
        return candidates | (_recombined(problem, config, facts) if config.recombine else {})


def _recombined(problem: LayerProblem, config: "DernConfig", facts: dict[str, object]) -> dict[str, Candidate]:
    """Return the recombined layer as a candidate, where any segment has moved; facts for the report are added."""
    recombined = recombine_layer(
        problem.layer.segments,
        problem.retained,
        problem.scores,
        threshold=config.similarity_threshold,
        similarity_weights=config.similarity_weights,
        init=config.cluster_init,
        iterations=config.cluster_iterations,
        tolerance=config.cluster_tolerance,
        importance_weighting=config.importance_weighting,
        neurons=problem.neurons,
        seed=config.seed,
        map_experts=problem.map_experts,
    )
    rows = None
    if config.router_update == "rows":
        if problem.layer.router_rows is None:
            raise ValueError("router_update='rows' needs a router with one weight row per expert; use 'none'")
        rows = add_moved_rows(problem.layer.router_rows, problem.retained, recombined.destination)
    facts |= _facts(recombined, problem.retained)
    if not facts["moved_share"]:  # it equals plain pruning
        return {}
    return {"recombined": Candidate(recombined.segments, rows, facts)}


def _tries_second_set(config: "DernConfig") -> bool:
    """Return whether a second set of retained experts, of least output error, is proposed to the guard."""
    return config.method == "dern" and config.selection == "router" and config.guard and config.sparsity != 0


def _search_tokens(tokens: int, top_k: int, experts: int) -> int:
    """Return on how many tokens all experts are run to search a set, which is about the work of one forward pass."""
    return max(FEWEST_TOKENS, tokens * top_k // experts)


def _pruned_by_error(problem: LayerProblem) -> dict[str, Candidate]:
    """Return a candidate that prunes by least output error, if that retains other experts."""
    layer = problem.layer
    tokens = _search_tokens(layer.statistics.tokens, layer.routing.index.shape[1], len(layer.segments.up))
    retained = least_error_set(layer, problem.places, tokens).to(problem.retained.device)
    found, before = torch.stack([retained, problem.retained]).cpu()
    if torch.equal(found, before):
        return {}
    return {"pruned by error": Candidate(layer.segments.select(found), retained=retained)}


def _facts(recombined: Recombination, retained: torch.Tensor) -> dict[str, object]:
    similarity = recombined.similarity.flatten().float()
    quantiles, moved = {}, 0.0
    if similarity.numel():
        ranks = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
        index = (ranks * (len(similarity) - 1)).round().long().tolist()  # torch.quantile is limited to 2^24 values
        sizes, share = similarity.sort().values, (recombined.destination >= 0).double().mean()
        *values, moved = torch.stack([*(sizes[i].double() for i in index), share]).tolist()
        quantiles = {f"{rank:.2f}": value for rank, value in zip(ranks.tolist(), values, strict=True)}
    flow = segment_flow(recombined.destination, retained)
    return {"moved_share": moved, "similarity_quantiles": quantiles, "segment_flow": flow}
