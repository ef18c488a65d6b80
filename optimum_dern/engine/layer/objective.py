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
        """(T,) bool: evenly spaced tokens that closed-form refits use, none of them held out."""
        chosen = evenly_spaced(self.measured.order, self.wanted, self.measured.processes)
        return ~self.held_out & chosen.to(self.held_out.device)

    @cached_property
    def fitted(self) -> Tensor:
        """(T,) bool: all tokens for fitting, which are those that are not held out."""
        return ~self.held_out

    def data(self, routing: Routing, tokens: Tensor) -> tuple[Routing, Tensor, Activation]:
        """Return the routing and target of some tokens (T,) bool, weighted by token, and the activation function."""
        chosen, goal = routing.select(tokens), self.measured.goal
        if goal is not None:
            chosen = chosen._replace(weight=chosen.weight * goal.token_weight[tokens].to(chosen.weight))
        return chosen, self.target[tokens], self.activation

    def error(self, variant: Variant) -> float:
        """Compute a variant's relative squared error on the held-out tokens of all processes."""
        routing, target, activation = self.data(variant.routing, self.held_out)
        return relative_error(routed_output(variant.candidate.segments, routing, activation), target, self.reduce)


def relative_error(output: Tensor, target: Tensor, reduce: Reduce = alone) -> float:
    """Compute |output - target|^2 / |target|^2 over all tokens; infinite where the output is not finite."""
    error, total = reduce((output - target).double().square().sum()), reduce(target.double().square().sum())
    return (error / total.clamp(min=1e-30)).nan_to_num(torch.inf).item()
