"""Expert pruning: the retained experts stay as they are."""

from ..config import DernConfig
from .registry import Candidate, LayerProblem, register_method


@register_method("prune")
class Prune:
    """Drop experts by any saliency (REAP, arXiv 2510.13999, and its relatives are this with another `selection`)."""

    needs_tokens = False

    def compress_layer(self, problem: LayerProblem, config: DernConfig) -> dict[str, Candidate]:
        return {"pruned": Candidate(problem.layer.segments.select(problem.retained))}
