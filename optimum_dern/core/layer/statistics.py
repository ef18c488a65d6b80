"""Sums per expert over the calibration tokens, from which selection criteria compute saliencies.

They are sums instead of means, so that the statistics of two batches or two processes are merged by adding them (one
is a maximum and merged as such).  All are float64, for sums over millions of tokens.  Padding has been removed before.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .cost import Cost, LayerShape, experts_operations, held_by_chunk
from .mixture import Activation, Routing, expert_batches, expert_output
from .reduction import Reduce, alone
from .segments import Segments


__all__ = ["measure_experts_cost", "ExpertStatistics", "measure_experts"]

MAXIMA = ("output_max",)  # fields that are maxima instead of sums


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over a layer's calibration tokens; E experts, output width o, g the gate weight, e the expert's output.

    Where the weight scales the expert's input, e is what comes out of the scaled input: it is then the whole
    contribution, and g does not multiply it once more.
    """

    tokens: int  # T, routed or not
    count: Tensor  # (E,) tokens routed to the expert
    weight: Tensor  # (E,) sum of g
    output_norm: Tensor  # (E,) sum of |e|
    output_norm_squared: Tensor  # (E,) sum of |e|^2
    weighted_output_norm: Tensor  # (E,) sum of g |e|, the norm of the contribution
    output_sum: Tensor  # (E, o) sum of e
    coactivation: Tensor  # (E, E) sum of (g_i |e_i|) (g_j |e_j|) over tokens routed to both
    together: Tensor  # (E, E) number of tokens routed to both; `count` on the diagonal
    output_max: Tensor  # (E,) largest absolute component of e

    @classmethod
    def zeros(cls, num_experts: int, output_size: int, device: torch.device | str = "cpu") -> "ExpertStatistics":
        """Return the statistics of zero tokens."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        vectors = [zeros(num_experts) for _ in range(5)]
        matrices = [zeros(num_experts, output_size), zeros(num_experts, num_experts), zeros(num_experts, num_experts)]
        return cls(0, *vectors, *matrices, zeros(num_experts))

    def merge(self, other: "ExpertStatistics") -> "ExpertStatistics":
        """Combine the statistics of two sets of tokens."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        merged = {name: torch.maximum(*pair) if name in MAXIMA else pair[0] + pair[1] for name, pair in pairs.items()}
        return ExpertStatistics(**merged)

    def reduced(self, reduce: Reduce) -> "ExpertStatistics":
        """Combine the statistics of all processes."""
        asked = "cpu" if reduce is alone else self.count.device  # only other processes need the number on a GPU
        tokens = reduce(torch.tensor(self.tokens, device=asked))
        operations = {f.name: "max" if f.name in MAXIMA else "sum" for f in fields(self)[1:]}
        reduced = {name: reduce(getattr(self, name), operation) for name, operation in operations.items()}
        return ExpertStatistics(int(tokens), **reduced)


def measure_experts(segments: Segments, routing: Routing, activation: Activation) -> tuple[ExpertStatistics, Tensor]:
    """Run a layer's experts on a batch of tokens; return their statistics and the routed output.

    Args:
        segments: E experts.
        routing: T tokens without padding.
        activation: the model's rule from pre-activations to neurons.

    Returns:
        Sums over the T tokens (merge batches with `ExpertStatistics.merge`), and the routed output (T, o), as
        `mixture.routed_output` gives it: the experts have to be run once for both.
    """
    norms = torch.zeros_like(routing.weight, dtype=segments.compute_dtype)  # (T, k)
    routed = segments.down.new_zeros(len(norms), segments.down.shape[-1], dtype=norms.dtype)  # (T, o)
    output_sum = torch.zeros_like(segments.down[:, 0], dtype=torch.float64)  # (E, o)
    output_max = torch.zeros_like(output_sum[:, 0])  # (E,)
    for batch in expert_batches(segments, routing, activation):
        output = expert_output(segments, batch)  # (n, o)
        routed.index_add_(0, batch.token, batch.weight * output)
        norms[batch.token, batch.slot] = output.norm(dim=1)
        output_sum[batch.expert] += output.sum(0)  # a chunk's in its own dtype, the many chunks' in float64
        largest = torch.stack(output.aminmax()).abs().max()
        output_max[batch.expert] = torch.maximum(output_max[batch.expert], largest.double())
        del batch, output  # before the next ones are computed
    chunk = max(1, segments.workspace.chunk_tokens // norms.shape[1])  # since pairs of slots are as many times more
    *vectors, coactivation, together = _sum_norms(routing, norms, len(output_sum), chunk)
    return ExpertStatistics(len(norms), *vectors, output_sum, coactivation, together, output_max), routed


def _sum_norms(routing: Routing, norms: Tensor, num_experts: int, chunk: int) -> list[Tensor]:
    """Sum the gate weights and norms of the outputs (T, k) by expert and by pair of experts.

    Returns:
        In float64, the sums (E,) of 1, g, |e|, |e|^2 and g |e|, then (E, E) of (g_i |e_i|) (g_j |e_j|) and of 1.
    """
    vectors = norms.new_zeros(5, num_experts, dtype=torch.float64)
    pairs = norms.new_zeros(2, num_experts**2, dtype=torch.float64)
    for index, weight, norm in zip(*(part.split(chunk) for part in (*routing[1:3], norms)), strict=True):  # (n, k)
        weight, norm = weight.double(), norm.double()
        share = norm if routing.weighs_input else weight * norm
        for total, value in zip(vectors, (torch.ones_like(norm), weight, norm, norm**2, share), strict=True):
            total.index_add_(0, index.flatten(), value.flatten())
        both = (index[:, :, None] * num_experts + index[:, None, :]).flatten()  # (n k k,)
        product = (share[:, :, None] * share[:, None, :]).flatten()
        for total, value in zip(pairs, (product, torch.ones_like(product)), strict=True):
            total.index_add_(0, both, value)
    return [*vectors, *pairs.view(2, num_experts, num_experts)]


def measure_experts_cost(shape: LayerShape) -> Cost:
    """Cost of `measure_experts`, excluding the routed output that it returns."""
    slots = shape.tokens * shape.top_k
    run = 8 * slots + held_by_chunk(shape)  # with the slots sorted by expert
    chunk = min(max(1, shape.chunk_tokens // shape.top_k), shape.tokens)
    pairs = 8 * (chunk * shape.top_k * (6 + 4 * shape.top_k) + 2 * shape.experts**2)  # float64 and int64
    held = shape.number * slots + 8 * shape.experts * shape.outputs + max(run, pairs)
    return Cost(held, 0, experts_operations(shape))
