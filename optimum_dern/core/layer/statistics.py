"""Sums per expert over the calibration tokens, from which selection criteria compute saliencies.

They are sums instead of means, so that the statistics of two batches or two processes are merged by adding them (one
is a maximum and merged as such).  All are float64, for sums over millions of tokens.  Padding has been removed before.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .cost import Cost, LayerShape, experts_operations, held_by_chunk
from .mixture import Activation, Routing, expert_batches, expert_output
from .reduction import Reduce
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
        tokens = reduce(torch.tensor(self.tokens, device=self.count.device))
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
    num_experts, output_size = len(segments.up), segments.down.shape[-1]
    index, weight = routing.index, routing.weight.double()
    output_weight = torch.ones_like(weight) if routing.weighs_input else weight  # (T, k)
    norms = torch.zeros_like(weight)  # (T, k)
    output_sum, output_max = weight.new_zeros(num_experts, output_size), weight.new_zeros(num_experts)
    routed = segments.down.new_zeros(len(index), output_size, dtype=segments.compute_dtype)  # (T, o)
    for batch in expert_batches(segments, routing, activation):
        output = expert_output(segments, batch)  # (n, o)
        routed.index_add_(0, batch.token, batch.weight * output)
        output = output.double()
        norms[batch.token, batch.slot] = output.norm(dim=1)
        output_sum[batch.expert] += output.sum(0)
        output_max[batch.expert] = torch.maximum(output_max[batch.expert], output.abs().max())

    def sums(values: Tensor) -> Tensor:
        return torch.zeros_like(output_sum[:, 0]).index_add_(0, index.flatten(), values.flatten())

    contribution = torch.zeros(len(index), num_experts, dtype=torch.float64, device=index.device)
    chosen = torch.zeros_like(contribution).scatter_(1, index, 1.0)  # (T, E)
    contribution.scatter_add_(1, index, output_weight * norms)  # (T, E)
    statistics = ExpertStatistics(
        tokens=len(index),
        count=sums(torch.ones_like(weight)),
        weight=sums(weight),
        output_norm=sums(norms),
        output_norm_squared=sums(norms**2),
        weighted_output_norm=sums(output_weight * norms),
        output_sum=output_sum,
        coactivation=contribution.T @ contribution,
        together=chosen.T @ chosen,
        output_max=output_max,
    )
    return statistics, routed


def measure_experts_cost(shape: LayerShape) -> Cost:
    """Cost of `measure_experts`, excluding the routed output that it returns."""
    pairs = 8 * shape.tokens * (2 * shape.experts + 6 * shape.top_k)  # float64
    chunk = held_by_chunk(shape) + 8 * min(shape.chunk_tokens, shape.tokens) * shape.outputs
    sums = 8 * shape.experts * (shape.outputs + 4 * shape.experts)
    return Cost(max(pairs, chunk) + sums, 0, experts_operations(shape) + 4.0 * shape.tokens * shape.experts**2)
