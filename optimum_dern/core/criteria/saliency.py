"""Saliency of experts: one function per published criterion, returning (E,) scores.

Larger is more important.  g is the gate weight applied by the model, e(x) the expert's output before it is scaled, X_i
the tokens routed to expert i, T all tokens.  With criteria that use tokens, an expert that no token reached scores 0.

`registry` lists all criteria, including those that choose a whole set of experts.
"""

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ..layer.mixture import expert_batches, expert_output
from ..layer.observation import ObservedLayer
from ..layer.segments import Segments
from ..layer.statistics import ExpertStatistics


__all__ = ["aimer", "ean", "easy_ep", "frequency", "man", "mone", "msan", "random", "reap", "router"]


def router(statistics: ExpertStatistics) -> Tensor:
    """Mean gate weight over all tokens, sum g / T (DERN, arXiv 2509.10377, step 1)."""
    return statistics.weight / max(statistics.tokens, 1)


def frequency(statistics: ExpertStatistics) -> Tensor:
    """Fraction of the tokens routed to the expert, |X_i| / T."""
    return statistics.count / max(statistics.tokens, 1)


def ean(statistics: ExpertStatistics) -> Tensor:
    """Expert activation norm, sum over X_i of |e| (the sum form of the REAP repository's `ean_sum`)."""
    return statistics.output_norm.clone()


def reap(statistics: ExpertStatistics) -> Tensor:
    """Router-weighted expert activation, mean over X_i of g |e| (REAP, arXiv 2510.13999)."""
    return _per_routed_token(statistics.weighted_output_norm, statistics)


def man(statistics: ExpertStatistics) -> Tensor:
    """Mean activation norm, mean over X_i of |e| (MAN, arXiv 2606.15716)."""
    return _per_routed_token(statistics.output_norm, statistics)


def msan(statistics: ExpertStatistics) -> Tensor:
    """Mean squared activation norm, mean over X_i of |e|^2 (MSAN, arXiv 2606.15716)."""
    return _per_routed_token(statistics.output_norm_squared, statistics)


def mone(statistics: ExpertStatistics) -> Tensor:
    """Fluctuation of the output times mean gate weight, |sqrt Var e| x sum g / T (MoNE, arXiv 2507.00390).

    The variance is over the tokens routed to the expert, component by component, so that its root's norm squared is
    mean |e|^2 - |mean e|^2.
    """
    count = statistics.count.clamp(min=1)
    spread = statistics.output_norm_squared / count - (statistics.output_sum / count.unsqueeze(1)).square().sum(1)
    return spread.clamp(min=0).sqrt() * router(statistics)


def aimer(segments: Segments) -> Tensor:
    """1 - mean |w| / root mean square w, over an expert's gate, up and down weights (AIMER, arXiv 2603.18492).

    The paper prunes where the ratio is high; it is never above 1, so this is between 0 and 1.
    """
    rows = slice(None, -1) if segments.biased else slice(None)  # the last column is a bias, which the paper leaves out
    *inward, down = segments.parts
    parts = [*(part[..., rows] for part in inward), down]
    count = sum(part[0].numel() for part in parts)

    def total(expert: int, order: int) -> Tensor:
        norms = [torch.linalg.vector_norm(part[expert], order, dtype=torch.float64) for part in parts]
        return sum(norm**order for norm in norms)

    mean = torch.stack([total(expert, 1) for expert in range(len(segments.up))]) / count
    square = torch.stack([total(expert, 2) for expert in range(len(segments.up))]) / count
    return 1 - mean / square.sqrt().clamp(min=1e-30)


def easy_ep(layer: ObservedLayer) -> Tensor:
    """Sum over X_i of g |e| max(0, 1 - cos(h, h + y)) (EASY-EP, arXiv 2504.06792).

    h is the residual stream before the experts, y the routed output: a token counts by how far the experts turn its
    residual stream.
    """
    chunk = layer.segments.workspace.chunk_tokens
    parts = zip(layer.residual.split(chunk), layer.target.split(chunk), strict=True)
    turned = [1 - torch.cosine_similarity(h.double(), h.double() + y.double(), dim=1) for h, y in parts]
    turned = torch.cat(turned).clamp(min=0)  # (T,)
    scores = turned.new_zeros(len(layer.segments.up))
    for batch in expert_batches(layer.segments, layer.routing, layer.activation):
        norms = (batch.weight * expert_output(layer.segments, batch)).double().norm(dim=1)
        scores[batch.expert] += (norms * turned[batch.token]).sum()
    return layer.reduce(scores)


def easy_ep_cost(shape: LayerShape) -> Cost:
    """Cost of `easy_ep`: another forward pass of the chosen experts."""
    held = held_by_chunk(shape) + 8 * (shape.tokens + 6 * min(shape.chunk_tokens, shape.tokens) * shape.outputs)
    return Cost(held, 0, experts_operations(shape))


def random(num_experts: int, seed: int) -> Tensor:
    """Uniform random scores, as a baseline for comparisons."""
    return torch.rand(num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _per_routed_token(total: Tensor, statistics: ExpertStatistics) -> Tensor:
    return total / statistics.count.clamp(min=1)
