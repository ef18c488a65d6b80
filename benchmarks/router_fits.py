"""Ways to make the N router rows of a merged layer from the E rows of the original, for `router_rows.py`.

z = W x are the original logits, R the representatives' rows, f how often the router takes an expert, t(x) the original
softmax with the shares of a group's members added up, l(x) the logarithms of its sums of exp z.  Sums over x go over
the calibration tokens; lambda is relative to the mean diagonal of each system.

`E rows`              as published: the original router, members' weights add up (not a plain checkpoint)
`representative`      R, what the package writes
`weighted mean`       sum of f_i W_i over a group / sum of f_i
`log mass`            R + argmin over D of sum |l - (R + D) x|^2 + lambda |D|^2
`log mass, weighted`  the same with |e|^2 = e^T (diag t - t t^T) e, as in HARC (arXiv 2606.03391): KL(t | softmax) to
                      second order around t
`KL, n steps`         Newton's from R towards argmin over W of sum KL(t | softmax(W x)), each of them D with
                      sum (diag p - p p^T) D x x^T + lambda D = sum (t - p) x^T, halved until KL falls
`KL of weights`       three such steps where t are the weights that a group's members get, 0 if none is chosen
`output, n steps`     the package's from R towards the original layer's output (`core.refits.router`), which takes one
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from optimum_dern.core.layer.mixture import Routing, routed_output
from optimum_dern.core.layer.observation import ObservedLayer
from optimum_dern.core.layer.segments import Segments
from optimum_dern.core.merging.averaging import shares
from optimum_dern.core.merging.grouping import Grouping
from optimum_dern.core.refits.conjugate_gradients import conjugate_gradients
from optimum_dern.core.refits.router import refit_router
from optimum_dern.core.router.rule import RouterRule, weight_shares
from optimum_dern.engine.layer.objective import relative_error
from optimum_dern.engine.layer.steps import RIDGE


SMALLEST = 2.0**-10  # share of one of Newton's steps


@dataclass(frozen=True)
class Merging:
    """What a method made of a layer, and what its router's rows may be fitted to."""

    layer: ObservedLayer  # E experts, T tokens
    grouping: Grouping
    merged: Segments  # N experts
    rule: RouterRule

    @property
    def hidden(self) -> Tensor:
        return self.layer.routing.hidden.double()  # (T, d)

    @property
    def representatives(self) -> Tensor:
        return self.layer.router_rows[self.grouping.retained].double()  # (N, d)

    @cached_property
    def mass(self) -> Tensor:
        return self.shares(self.layer.router_rows)  # (T, N)

    def groups(self, rows: Tensor) -> Tensor:
        """Which of the N experts each row is for: those of E rows add up."""
        return self.grouping.label if len(rows) == len(self.grouping.label) else torch.arange(len(rows))

    def shares(self, rows: Tensor) -> Tensor:
        """(T, N) of the softmax by these rows."""
        share = (self.hidden @ rows.double().T).softmax(1)
        return share.new_zeros(len(share), len(self.merged.up)).index_add_(1, self.groups(rows), share)

    @property
    def weights(self) -> Tensor:
        """(T, N) shares of the experts that the original router chooses, by group."""
        index, weight = self.grouping.label[self.layer.routing.index], self.layer.routing.weight.double()
        return torch.zeros_like(self.mass).scatter_add_(1, index, weight / weight.sum(1, keepdim=True))

    def kl(self, rows: Tensor, target: Tensor) -> float:
        """From these rows' shares to a target (T, N), nats per token."""
        return nn.functional.kl_div(self.shares(rows).log(), target, reduction="batchmean").item()

    def routing(self, rows: Tensor) -> Routing:
        """How these rows send the tokens to the N experts."""
        routing = self.layer.routing
        logits = routing.hidden @ rows.to(routing.hidden).T
        index = logits.topk(routing.index.shape[1], dim=1).indices
        weight = self.rule.scale * weight_shares(logits, index, self.rule.phi, self.rule.over_all).gather(1, index)
        return routing._replace(index=self.groups(rows)[index], weight=weight)

    def error(self, rows: Tensor) -> float:
        """Relative, of the merged layer's output by these rows."""
        return relative_error(routed_output(self.merged, self.routing(rows), self.layer.activation), self.layer.target)


def weighted_mean(merging: Merging) -> Tensor:
    """Rows averaged as the experts are."""
    rows, frequency = merging.layer.router_rows.double(), merging.layer.statistics.count
    groups = [merging.grouping.members(position) for position in range(len(merging.merged.up))]
    return torch.stack([rows.new_tensor(shares(frequency, group)) @ rows[group] for group in groups])


def fit_log_mass(merging: Merging, weighted: bool) -> Tensor:
    """The representatives' rows moved so that their logits come near the logarithms of the groups' sums."""
    rows, hidden = merging.representatives, merging.hidden
    normaliser = (hidden @ merging.layer.router_rows.double().T).logsumexp(1, keepdim=True)  # (T, 1)
    missing = merging.mass.log() + normaliser - hidden @ rows.T  # (T, N)
    if weighted:
        return rows + solve(merging.mass, fisher(merging.mass, missing), hidden)
    gram = hidden.T @ hidden
    gram.diagonal().add_(RIDGE * gram.trace() / len(gram))
    return rows + torch.linalg.solve(gram, hidden.T @ missing).T


def fit_shares(merging: Merging, target: Tensor, steps: int) -> Tensor:
    """The representatives' rows after some of Newton's steps towards shares (T, N)."""
    rows, hidden = merging.representatives, merging.hidden
    for _ in range(steps):
        share, before, size = merging.shares(rows), merging.kl(rows, target), 1.0
        step = solve(share, target - share, hidden)
        # whole ones mostly overshoot from R
        while merging.kl(rows + size * step, target) > before and size > SMALLEST:
            size /= 2
        rows = rows + size * step
    return rows


def fisher(share: Tensor, logits: Tensor) -> Tensor:
    """(diag p - p p^T) z of every token: (T, N)."""
    product = share * logits
    return product - share * product.sum(1, keepdim=True)


def solve(share: Tensor, right: Tensor, hidden: Tensor, ridge: float = RIDGE) -> Tensor:
    """D (N, d) with sum (diag p - p p^T) D x x^T + lambda D = sum b x^T, from p, b (T, N) and x (T, d)."""
    trace = ((share - share.square()).sum(1) * hidden.square().sum(1)).sum()
    penalty = ridge * trace / (share.shape[1] * hidden.shape[1])

    def system(step: Tensor) -> Tensor:
        return fisher(share, hidden @ step.T).T @ hidden + penalty * step

    return conjugate_gradients(system, right.T @ hidden, iterations=200, tolerance=1e-5)


def fit_output(merging: Merging, steps: int) -> Tensor:
    """The representatives' rows after some Gauss-Newton steps towards the layer's output."""
    layer, rows = merging.layer, merging.representatives.to(merging.layer.target)
    for _ in range(steps):
        data = merging.merged, merging.routing(rows), layer.target, layer.activation
        rows = refit_router(rows, *data, merging.rule, RIDGE)
    return rows


ROWS: dict[str, Callable[[Merging], Tensor]] = {
    "E rows": lambda merging: merging.layer.router_rows,
    "representative": lambda merging: merging.representatives,
    "weighted mean": weighted_mean,
    "log mass": lambda merging: fit_log_mass(merging, weighted=False),
    "log mass, weighted": lambda merging: fit_log_mass(merging, weighted=True),
    "KL, 1 step": lambda merging: fit_shares(merging, merging.mass, 1),
    "KL, 3 steps": lambda merging: fit_shares(merging, merging.mass, 3),
    "KL of weights": lambda merging: fit_shares(merging, merging.weights, 3),
    "output, 1 step": lambda merging: fit_output(merging, 1),
    "output, 3 steps": lambda merging: fit_output(merging, 3),
}
