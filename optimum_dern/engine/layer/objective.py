"""`Objective`: what the candidates of a layer are fitted to and judged by."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...core.layer.mixture import Activation, Routing, routed_output
from ...core.layer.reduction import Reduce, alone
from ...data.token_order import evenly_spaced
from ...models.moe.view import layer_activation
from .measured import MeasuredLayer
from .variant import Variant


__all__ = ["Objective", "relative_error"]


@dataclass(frozen=True)
class Objective:
    """The output that candidates aim at, on which tokens they are fitted, and on which they are judged."""

    measured: MeasuredLayer
    held_out: Tensor  # (T,) bool: tokens that judge; the others are fitted
    wanted: int  # of those, about how many closed forms see, over all processes

    @property
    def target(self) -> Tensor:
        """(T, o) output to reproduce, each token times its weight."""
        return self.measured.target if self.measured.goal is None else self.measured.goal.target

    @property
    def activation(self) -> Activation:
        """The layer's own rule from pre-activations to neurons."""
        return layer_activation(self.measured.layer)

    @property
    def reduce(self) -> Reduce:
        """Sum over the processes that share the tokens."""
        return self.measured.processes.reduce

    @cached_property
    def sampled(self) -> Tensor:
        """(T,) bool: fitted tokens that closed forms see, evenly spaced."""
        chosen = evenly_spaced(self.measured.order, self.wanted, self.measured.processes)
        return ~self.held_out & chosen.to(self.held_out.device)

    @cached_property
    def fitted(self) -> Tensor:
        """(T,) bool: all tokens that may be fitted."""
        return ~self.held_out

    def data(self, routing: Routing, tokens: Tensor) -> tuple[Routing, Tensor, Activation]:
        """Routing and target of some tokens, (T,) bool, both times the tokens' weights, and the activation."""
        chosen, goal = routing.select(tokens), self.measured.goal
        if goal is not None:
            chosen = chosen._replace(weight=chosen.weight * goal.token_weight[tokens].to(chosen.weight))
        return chosen, self.target[tokens], self.activation

    def error(self, variant: Variant) -> float:
        """A variant's relative squared error on the held-out tokens of all processes."""
        routing, target, activation = self.data(variant.routing, self.held_out)
        return relative_error(routed_output(variant.candidate.segments, routing, activation), target, self.reduce)


def relative_error(output: Tensor, target: Tensor, reduce: Reduce = alone) -> float:
    """|output - target|^2 / |target|^2, summed over all tokens; infinite where the output is not finite."""
    error, total = reduce((output - target).double().square().sum()), reduce(target.double().square().sum())
    return (error / total.clamp(min=1e-30)).nan_to_num(torch.inf).item()
