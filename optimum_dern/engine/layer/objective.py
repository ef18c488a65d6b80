"""`Objective`: what the candidates of a layer are fitted to and judged by."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.layer.mixture import Activation, Routing, routed_output
from ...core.layer.reduction import Reduce, alone
from ...core.layer.slots import slots_by_expert
from ...data.labels import evenly_spaced
from ...models.moe.view import layer_activation
from ..measure.measured import MeasuredLayer
from .variant import HeldOutError, Variant


__all__ = ["Objective", "relative_errors"]


@dataclass(frozen=True)
class Objective:
    """The output that candidates are to reproduce, the tokens they are fitted on, and those they are judged on."""

    measured: MeasuredLayer
    held_out: Tensor  # (T,) bool on the CPU: tokens for judging; the others are for fitting
    wanted: int  # about how many tokens closed-form refits use, over all processes

    @property
    def device(self) -> torch.device:
        """Where the layer's tokens are, and candidates are fitted."""
        return self.measured.target.device

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
        return self.measured.order[~self.held_out]

    @cached_property
    def judges(self) -> bool:
        """Whether any process has held-out tokens."""
        return self.measured.processes.total(int(self.held_out.sum())) > 0

    @cached_property
    def _tokens(self) -> tuple[Tensor, ...]:
        """The tokens sampled, fitted and judged, and the sources of the latter: found on the CPU and copied together.

        So a GPU is not asked how many they are.
        """
        sampled = evenly_spaced(self.measured.order, self.wanted, self.measured.processes) & ~self.held_out
        found = [mask.nonzero().flatten() for mask in (sampled, ~self.held_out, self.held_out)]
        found.append(self.measured.labels.source[self.held_out])
        return torch.cat(found).to(self.device).split([len(part) for part in found])

    @cached_property
    def _slots(self) -> WeakTensorKeyDictionary:
        """Slots of the experts among the tokens sampled and judged, by the indices of the routing that they are of."""
        return WeakTensorKeyDictionary()

    def data(self, variant: Variant, tokens: str) -> tuple[Routing, Tensor, Activation]:
        """Return the routing and target of some tokens, weighted by token, and the activation function.

        Args:
            variant: whose routing.
            tokens: "sampled", "fitted" or "judged".
        """
        rows, goal = getattr(self, tokens), self.measured.goal
        chosen = variant.routing.select(rows)
        if tokens != "fitted":  # whose slots are found by minibatch
            chosen = chosen._replace(slots=self._slots_of(variant)[tokens])
        target = self.measured.target[rows]
        if goal is not None:
            chosen = chosen._replace(weight=chosen.weight * goal.token_weight[rows].to(chosen.weight))
            target = goal.target(target, rows)
        return chosen, target, self.activation

    def _slots_of(self, variant: Variant) -> dict[str, tuple[Tensor, ...]]:
        """Find the experts' slots once for all variants of one routing: a GPU has to be asked how many they are."""
        index, parts = variant.routing.index, ("sampled", "judged")
        if index not in self._slots:
            batches = [index[getattr(self, part)] for part in parts]
            found = slots_by_expert(batches, len(variant.candidate.segments.up))
            self._slots[index] = dict(zip(parts, found, strict=True))
        return self._slots[index]

    def error(self, variant: Variant) -> HeldOutError:
        """Return a variant's relative squared error on the held-out tokens of all processes."""
        if variant.error is not None:
            return variant.error
        routing, target, activation = self.data(variant, "judged")
        output = routed_output(variant.candidate.segments, routing, activation)
        return relative_errors(output, target, self._tokens[3], self.measured.labels.names, self.reduce)


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
