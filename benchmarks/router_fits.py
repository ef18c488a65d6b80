"""Ways to make the N router rows of a merged layer from the E rows of the original, for `router_rows.py`.

z = W x are the original logits, R the representatives' rows, f how often the router takes an expert, t(x) the original
softmax with the shares of a group's members added up, l(x) the logarithms of its sums of exp z.  Sums over x go over
the calibration tokens; lambda is relative to the mean diagonal of each system.

`E rows`              as published: the original router, members' weights are added (not a plain checkpoint)
`representative`      R, as the package writes it
`weighted mean`       sum of f_i W_i over a group / sum of f_i
`log mass`            R + argmin over D of sum |l - (R + D) x|^2 + lambda |D|^2
`log mass, weighted`  the same with |e|^2 = e^T (diag t - t t^T) e, as in HARC (arXiv 2606.03391): KL(t | softmax) to
                      second order around t
`KL, n steps`         Newton steps from R towards argmin over W of sum KL(t | softmax(W x)), each step D solving
                      sum (diag p - p p^T) D x x^T + lambda D = sum (t - p) x^T, halved until KL falls
`KL of weights`       three such steps with the routing weights of a group's members as t, 0 if none is chosen
`output, n steps`     the package's Gauss-Newton step from R towards the original layer's output
                      (`core.refits.router`), n times; the package itself takes one
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
from optimum_dern.core.refits.router import conjugate_gradients, refit_router
from optimum_dern.core.router.rule import RouterRule, weight_shares
from optimum_dern.engine.layer.objective import relative_errors
from optimum_dern.engine.layer.steps import RIDGE


SMALLEST = 2.0**-10  # smallest fraction of a Newton step


@dataclass(frozen=True)
class Merging:
    """A layer merged by a method, and the targets that its router's rows may be fitted to."""

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
        """Return the merged expert (of N) that each router row is for; with E rows several are for the same one."""
        return self.grouping.label if len(rows) == len(self.grouping.label) else torch.arange(len(rows))

    def shares(self, rows: Tensor) -> Tensor:
        """Compute the softmax of these router rows, summed by merged expert: (T, N)."""
        share = (self.hidden @ rows.double().T).softmax(1)
        return share.new_zeros(len(share), len(self.merged.up)).index_add_(1, self.groups(rows), share)

    @property
    def weights(self) -> Tensor:
        """(T, N) normalised routing weights of the original router, summed by merged expert."""
        index, weight = self.grouping.label[self.layer.routing.index], self.layer.routing.weight.double()
        return torch.zeros_like(self.mass).scatter_add_(1, index, weight / weight.sum(1, keepdim=True))

    def kl(self, rows: Tensor, target: Tensor) -> float:
        """Compute KL(target | shares of these rows) in nats per token, for a target (T, N)."""
        return nn.functional.kl_div(self.shares(rows).log(), target, reduction="batchmean").item()

    def routing(self, rows: Tensor) -> Routing:
        """Route the tokens to the N experts with these router rows."""
        routing = self.layer.routing
        logits = routing.hidden @ rows.to(routing.hidden).T
        index = logits.topk(routing.index.shape[1], dim=1).indices
        weight = self.rule.scale * weight_shares(logits, index, self.rule.phi, self.rule.over_all).gather(1, index)
        return routing._replace(index=self.groups(rows)[index], weight=weight)

    def error(self, rows: Tensor) -> float:
        """Compute the relative error of the merged layer's output with these router rows."""
        output, target = routed_output(self.merged, self.routing(rows), self.layer.activation), self.layer.target
        source = torch.zeros(len(target), dtype=torch.int64, device=target.device)
        return relative_errors(output, target, source, ["all"]).total


def weighted_mean(merging: Merging) -> Tensor:
    """Average the rows of each group with the weights of its experts' average."""
    rows, frequency = merging.layer.router_rows.double(), merging.layer.statistics.count
    groups = [merging.grouping.members(position) for position in range(len(merging.merged.up))]
    return torch.stack([rows.new_tensor(shares(frequency, group)) @ rows[group] for group in groups])


def fit_log_mass(merging: Merging, weighted: bool) -> Tensor:
    """Fit the representatives' rows so that their logits approximate the log of each group's sum of exp(logits)."""
    rows, hidden = merging.representatives, merging.hidden
    normaliser = (hidden @ merging.layer.router_rows.double().T).logsumexp(1, keepdim=True)  # (T, 1)
    missing = merging.mass.log() + normaliser - hidden @ rows.T  # (T, N)
    if weighted:
        return rows + solve(merging.mass, fisher(merging.mass, missing), hidden)
    gram = hidden.T @ hidden
    gram.diagonal().add_(RIDGE * gram.trace() / len(gram))
    return rows + torch.linalg.solve(gram, hidden.T @ missing).T


def fit_shares(merging: Merging, target: Tensor, steps: int) -> Tensor:
    """Fit the representatives' rows to target shares (T, N) by Newton steps."""
    rows, hidden = merging.representatives, merging.hidden
    for _ in range(steps):
        share, before, size = merging.shares(rows), merging.kl(rows, target), 1.0
        step = solve(share, target - share, hidden)
        # full steps from R mostly overshoot
        while merging.kl(rows + size * step, target) > before and size > SMALLEST:
            size /= 2
        rows = rows + size * step
    return rows


def fisher(share: Tensor, logits: Tensor) -> Tensor:
    """Compute (diag p - p p^T) z of every token: (T, N)."""
    product = share * logits
    return product - share * product.sum(1, keepdim=True)


def solve(share: Tensor, right: Tensor, hidden: Tensor, ridge: float = RIDGE) -> Tensor:
    """Solve sum (diag p - p p^T) D x x^T + lambda D = sum b x^T for D (N, d), given p, b (T, N) and x (T, d)."""
    trace = ((share - share.square()).sum(1) * hidden.square().sum(1)).sum()
    penalty = ridge * trace / (share.shape[1] * hidden.shape[1])

    def system(step: Tensor) -> Tensor:
        return fisher(share, hidden @ step.T).T @ hidden + penalty * step

    return conjugate_gradients(system, right.T @ hidden, iterations=200, tolerance=1e-5)


def fit_output(merging: Merging, steps: int) -> Tensor:
    """Fit the representatives' rows to the layer's output by Gauss-Newton steps."""
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
