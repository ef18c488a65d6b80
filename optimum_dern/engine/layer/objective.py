"""`Objective`: what the candidates of a layer are fitted to and judged by."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...core.layer.mixture import Activation, Routing, routed_output
from ...core.layer.reduction import Reduce, alone, any_process
from ...data.labels import evenly_spaced
from ...models.moe.view import layer_activation
from .measured import MeasuredLayer
from .variant import Variant


__all__ = ["HeldOutError", "Objective", "relative_errors"]


@dataclass(frozen=True)
class HeldOutError:
    """Relative squared error of a variant on the held-out tokens."""

    total: float
    by_source: dict[str, float]  # of each source that has held-out tokens

    def exceeds(self, limit: "HeldOutError") -> bool:
        """Return whether the error of any source is above that of another variant."""
        return any(error > limit.by_source[name] for name, error in self.by_source.items())


@dataclass(frozen=True)
class Objective:
    """The output that candidates are to reproduce, the tokens they are fitted on, and those they are judged on."""

    measured: MeasuredLayer
    held_out: Tensor  # (T,) bool: tokens for judging; the others are for fitting
    wanted: int  # about how many tokens closed-form refits use, over all processes

    @property
    def target(self) -> Tensor:
        """(T, o) output to reproduce, each token multiplied by its weight."""
        return self.measured.target if self.measured.goal is None else self.measured.goal.target

    @property
    def activation(self) -> Activation:
        """The layer's activation function, from the gate and up projections to the neurons' activations."""
        return layer_activation(self.measured.layer)

    @property
    def reduce(self) -> Reduce:
        """The sum over the processes that share the tokens (all-reduce)."""
        return self.measured.processes.reduce

    @cached_property
    def sampled(self) -> Tensor:
        """(n,) indices of evenly spaced tokens that closed-form refits use, none of them held out."""
        chosen = evenly_spaced(self.measured.order, self.wanted, self.measured.processes)
        return (~self.held_out & chosen.to(self.held_out.device)).nonzero().flatten()

    @cached_property
    def judges(self) -> bool:
        """Whether any process has held-out tokens."""
        return any_process(self.held_out.any(), self.reduce)

    @cached_property
    def fitted(self) -> Tensor:
        """(n,) indices of all tokens for fitting, which are those that are not held out."""
        return (~self.held_out).nonzero().flatten()

    @cached_property
    def judged(self) -> Tensor:
        """(n,) indices of the held-out tokens."""
        return self.held_out.nonzero().flatten()

    def data(self, routing: Routing, tokens: Tensor) -> tuple[Routing, Tensor, Activation]:
        """Return the routing and target of some tokens (n,), weighted by token, and the activation function."""
        chosen, goal = routing.select(tokens), self.measured.goal
        if goal is not None:
            chosen = chosen._replace(weight=chosen.weight * goal.token_weight[tokens].to(chosen.weight))
        return chosen, self.target[tokens], self.activation

    def error(self, variant: Variant) -> HeldOutError:
        """Compute a variant's relative squared error on the held-out tokens of all processes."""
        routing, target, activation = self.data(variant.routing, self.judged)
        output, labels = routed_output(variant.candidate.segments, routing, activation), self.measured.labels
        return relative_errors(output, target, labels.source[self.judged], labels.names, self.reduce)


def relative_errors(
    output: Tensor, target: Tensor, source: Tensor, names: Sequence[str], reduce: Reduce = alone
) -> HeldOutError:
    """Compute |output - target|^2 / |target|^2 over all tokens, and over the tokens of each source.

    Args:
        output: (T, o) of a variant.
        target: (T, o) to reproduce.
        source: (T,) int64 index of each token's source.
        names: of the sources.
        reduce: sum over the processes that share the tokens.

    Returns:
        The errors, without sources of no token; infinite where the output is not finite.
    """
    squares = torch.stack([(output - target).double().square().sum(1), target.double().square().sum(1)])  # (2, T)
    ones = torch.ones_like(squares[:1])
    sums = squares.new_zeros(3, len(names)).index_add_(1, source, torch.cat([squares, ones]))  # (3, sources)
    sums = reduce(sums)
    errors, totals, tokens = torch.cat([sums.sum(1, keepdim=True), sums], dim=1)  # first of all sources
    relative = (errors / totals.clamp(min=1e-30)).nan_to_num(torch.inf, torch.inf)
    (total, *by_source), (_, *counts) = torch.stack([relative, tokens]).tolist()  # the host waits once
    found = zip(names, by_source, counts, strict=True)
    return HeldOutError(total, {name: error for name, error, count in found if count})
