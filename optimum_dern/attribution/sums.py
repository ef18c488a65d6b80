"""Sums of what a layer's experts and neurons do for one domain, and the tokens for which each expert does most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.layer.mixture import Activation, Routing, expert_batches, expert_output
from ..core.layer.segments import Segments


__all__ = ["DomainSums", "TopTokens"]


@dataclass(frozen=True)
class DomainSums:
    """Sums over a domain's tokens, in float64; g is the gate weight, e the expert's output, w a neuron's column."""

    count: Tensor  # (E,) tokens routed to the expert
    gate: Tensor  # (E,) sum of g
    contribution: Tensor  # (E,) sum of |g e|
    energy: Tensor  # (E,) sum of |g e|^2
    neurons: Tensor  # (E, f) sum of |g h w|^2

    @classmethod
    def zeros(cls, segments: Segments) -> "DomainSums":
        """Return the sums of zero tokens, on the CPU."""
        experts, width = segments.up.shape[:2]
        vectors = [torch.zeros(experts, dtype=torch.float64) for _ in range(4)]
        return cls(*vectors, torch.zeros(experts, width, dtype=torch.float64))

    def add_(
        self, segments: Segments, routing: Routing, activation: Activation, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the experts on a batch, and add its real tokens.

        Args:
            segments: E experts.
            routing: T tokens, with padding.
            activation: the model's rule from pre-activations to neurons.
            real: (T,) bool, True for a real token.

        Returns:
            The routed output (T, o), and the size |g e| of each contribution (T, k).
        """
        sizes = torch.zeros_like(routing.weight, dtype=segments.compute_dtype)
        routed = segments.down.new_zeros(len(sizes), segments.down.shape[-1], dtype=sizes.dtype)  # (T, o)
        for batch in expert_batches(segments, routing, activation):
            output = batch.weight * expert_output(segments, batch)  # (n, o)
            routed.index_add_(0, batch.token, output)
            sizes[batch.token, batch.slot] = size = output.norm(dim=1)  # (n,)
            own = real[batch.token]
            gate, size = routing.weight[batch.token, batch.slot][own].double(), size[own].double()
            squares = (batch.weight * batch.neurons)[own].double().square().sum(0)  # (f,)
            columns = segments.down[batch.expert].double().square().sum(-1)  # (f,)
            self.count[batch.expert] += len(size)
            for total, value in zip(
                (self.gate, self.contribution, self.energy, self.neurons),
                (gate.sum(), size.sum(), size.square().sum(), squares * columns),
                strict=True,
            ):
                total[batch.expert] += value.cpu()
        return routed, sizes


class TopTokens:
    """The tokens for which each expert of a layer does most, of all batches so far.

    Args:
        experts: E.
        kept: tokens for each expert.
    """

    def __init__(self, experts: int, kept: int) -> None:
        self.size = torch.full((experts, kept), -1.0)  # (E, kept), -1 for none
        self.place = torch.full((experts, kept, 2), -1)  # batch, and position in it

    def add_(self, index: Tensor, sizes: Tensor, batch: int, positions: Tensor) -> None:
        """Add the tokens of a batch.

        Args:
            index: (T, k) experts.
            sizes: (T, k) of their contributions.
            batch: number of the batch.
            positions: (T,) where the tokens are in the flattened batch.
        """
        index, sizes, positions = index.cpu(), sizes.float().cpu(), positions.cpu()
        for expert in range(len(self.size)):
            token, slot = (index == expert).nonzero(as_tuple=True)
            places = torch.stack([torch.full_like(token, batch), positions[token]], 1)
            size = torch.cat([self.size[expert], sizes[token, slot]])
            place = torch.cat([self.place[expert], places])
            best = size.argsort(descending=True, stable=True)[: self.size.shape[1]]
            self.size[expert], self.place[expert] = size[best], place[best]
