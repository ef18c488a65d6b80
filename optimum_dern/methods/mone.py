"""MoNE (arXiv 2507.00390): put a constant in a dropped expert's place, as far as a plain checkpoint can hold that.

score      phi_i = | sqrt Var_{X_i} e_i | x mean over all tokens of g_i; the experts of lowest score are dropped
constant   mu_i = mean over X_i of e_i

In the paper the router still chooses dropped experts, which then add g_i mu_i.  In a plain checkpoint they are gone,
and what can stay is what they add on average, c = sum over the dropped experts of mean(g_i) mu_i: it goes into the
output biases of the retained experts, divided by the mean total of their weights.  So this needs a family whose
experts have output biases (gpt-oss).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.router.rows import dropped_experts
from .registry import Candidate, LayerProblem, register_method


if TYPE_CHECKING:
    from ..config import DernConfig
    from ..models.moe.structure import MoELayer


@register_method("mone")
class Mone:
    """The MoNE method; proposes the pruned layer, and that with what the dropped experts add on average."""

    needs_tokens = False
    defaults = {"selection": "mone"}
    options = ()

    def check(self, layers: Sequence["MoELayer"], count: int) -> None:
        if not layers[0].layout.biased:
            raise ValueError(
                f"method='mone' keeps constants in the experts' output biases, and those of {layers[0].name} have "
                "none; choose method='prune' with selection='mone', whose experts are the same"
            )

    def candidates(self, config: "DernConfig") -> tuple[int, int]:
        return 2, 1

    def compress_layer(self, problem: LayerProblem, config: "DernConfig") -> dict[str, Candidate]:
        segments, statistics = problem.layer.segments.select(problem.retained), problem.layer.statistics
        dropped = dropped_experts(len(problem.scores), problem.retained).to(statistics.weight.device)
        means = statistics.output_sum / statistics.count.clamp(min=1).unsqueeze(1)  # (E, o)
        gate = statistics.weight / max(statistics.tokens, 1)  # (E,)
        lost = (gate[dropped].unsqueeze(1) * means[dropped]).sum(0) / gate.sum().clamp(min=1e-300)  # (o,)
        bias = segments.output_bias + lost.to(segments.output_bias)
        return {"pruned": Candidate(segments), "novices": Candidate(segments._replace(output_bias=bias))}
