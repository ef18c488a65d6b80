"""Expert pruning: drop experts and keep the retained ones unchanged."""

from typing import TYPE_CHECKING

from .registry import Candidate, LayerProblem, register_method


if TYPE_CHECKING:
    from ..config import DernConfig


@register_method("prune")
class Prune:
    """The pruning method; with selection="reap" it is REAP (arXiv 2510.13999)."""

    needs_tokens = False
    options = ()
    keeps_experts = True

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        return 1, 1

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        return {"pruned": Candidate(problem.layer.segments.select(problem.retained))}
