"""DERN (arXiv 2509.10377): dropped experts' neurons are recombined into the retained experts."""

import torch

from ..config import DernConfig
from ..core.recombination import Recombination, recombine_layer
from ..core.routing import add_moved_rows
from .registry import Candidate, LayerProblem, register_method


@register_method("dern")
class Dern:
    """Plain pruning beside the recombined layer, for the guard to choose from."""

    def compress_layer(self, problem: LayerProblem, config: DernConfig) -> dict[str, Candidate]:
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
            seed=config.seed,
            map_experts=problem.map_experts,
        )
        rows = None
        if config.router_update == "rows":
            if problem.layer.router_rows is None:
                raise ValueError("router_update='rows' needs a router with one weight row per expert; use 'none'")
            rows = add_moved_rows(problem.layer.router_rows, problem.retained, recombined.destination)
        facts = _facts(recombined)
        pruned = Candidate(problem.layer.segments.select(problem.retained), facts=facts)
        if not facts["moved_share"]:  # then both are the same to the bit
            return {"pruned": pruned}
        return {"pruned": pruned, "recombined": Candidate(recombined.segments, rows, facts)}


def _facts(recombined: Recombination) -> dict[str, object]:
    similarity = recombined.similarity.flatten().float()
    quantiles = {}
    if similarity.numel():
        ranks = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], device=similarity.device)
        index = (ranks * (len(similarity) - 1)).round().long()  # torch.quantile is limited to 2^24 values
        quantiles = {
            f"{r:.2f}": v for r, v in zip(ranks.tolist(), similarity.sort().values[index].tolist(), strict=True)
        }
    moved = (recombined.destination >= 0).double().mean().item() if similarity.numel() else 0.0
    return {"moved_share": moved, "similarity_quantiles": quantiles}
