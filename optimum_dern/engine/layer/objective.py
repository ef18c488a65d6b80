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
from ..measure.measured import MeasuredLayer
from .variant import HeldOutError, Variant


__all__ = ["HeldOutError", "Objective", "relative_errors"]


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

    @property
    def sampled(self) -> Tensor:
        """(n,) indices of evenly spaced tokens that closed-form refits use, none of them held out."""
        return self._tokens[0]

    @property
    def fitted(self) -> Tensor:
        """(n,) indices of all tokens for fitting, which are those that are not held out."""
        return self._tokens[1]

    @property
    def judged(self) -> Tensor:
        """(n,) indices of the held-out tokens."""
        return self._tokens[2]

    @cached_property
    def fitted_order(self) -> Tensor:
        """(n,) on the CPU: numbers of the tokens for fitting among those of all processes."""
        return self.measured.order[~self._held_out]

    @cached_property
    def judges(self) -> bool:
        """Whether any process has held-out tokens."""
        device = self.measured.processes.device
        return any_process(torch.tensor(bool(self._held_out.any()), device=device), self.reduce)

    @cached_property
    def _held_out(self) -> Tensor:
        return self.held_out.cpu()

    @cached_property
    def _tokens(self) -> tuple[Tensor, ...]:
        """The tokens sampled, fitted and judged: found on the CPU, so that a GPU is not asked how many they are."""
        sampled = evenly_spaced(self.measured.order, self.wanted, self.measured.processes) & ~self._held_out
        found = [mask.nonzero().flatten() for mask in (sampled, ~self._held_out, self._held_out)]
        return torch.cat(found).to(self.held_out.device).split([len(part) for part in found])

    def data(self, routing: Routing, tokens: Tensor) -> tuple[Routing, Tensor, Activation]:
        """Return the routing and target of some tokens (n,), weighted by token, and the activation function."""
        chosen, goal = routing.select(tokens), self.measured.goal
        if goal is not None:
            chosen = chosen._replace(weight=chosen.weight * goal.token_weight[tokens].to(chosen.weight))
        return chosen, self.target[tokens], self.activation

    def error(self, variant: Variant) -> HeldOutError:
        """Return a variant's relative squared error on the held-out tokens of all processes."""
        if variant.error is not None:
            return variant.error
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
