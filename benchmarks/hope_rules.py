"""Method that prunes by HOPE with its matrix averaged over all tokens, for `ablations.py`; registered on import.

HOPE (arXiv 2609.18916) takes F_ij as the mean of a_i a_j over the tokens that chose both experts, so that a pair
chosen together once counts like one that is always chosen together.  As a mean over all tokens, p^T F p is the mean
squared total output of the pruned experts: E (sum over pruned i of a_i)^2.
"""

from dataclasses import replace

import torch

from optimum_dern import DernConfig
from optimum_dern.core.criteria.hope import hope
from optimum_dern.methods import Candidate, LayerProblem, register_method


@register_method("hope, over all tokens")
class HopeOverAllTokens:
    """Expert pruning by HOPE's criterion with means over all tokens."""

    needs_tokens = False

    def compress_layer(self, problem: LayerProblem, config: DernConfig) -> dict[str, Candidate]:
        layer, statistics = problem.layer, problem.layer.statistics
        everywhere = replace(statistics, together=torch.full_like(statistics.together, statistics.tokens))
        _, retained = hope(everywhere, problem.places)
        return {"pruned": Candidate(layer.segments.select(retained), retained=retained)}
