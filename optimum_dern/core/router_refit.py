"""Closed-form refit of the router of the retained experts.

Dropping experts sends their tokens elsewhere, by a router that was never asked to rank the remaining experts for them.
One Gauss-Newton step moves the rows of the retained experts so that the routed output comes closer to the original
layer's, with the experts themselves fixed:

    min  sum_x | y(x) - y'(x) - J(x) dW x |^2  +  lambda |dW|^2

J is the derivative of the routed output y' by the router's logits.  Most routers apply weights of one form,

    g_s = scale * phi(z_s) / sum over r in R of phi(z_r),        z = W x,

with phi = exp or sigmoid and R the chosen experts or all of them.  Which one a router follows is recognised from what
it does on the calibration tokens; a router of another form is left alone.  With pi = g / scale and u = phi'/phi,

    dy' = sum over chosen s of g_s u_s dz_s e_s(x)  -  y'(x) sum over R of pi_r u_r dz_r

The normal equations are solved by conjugate gradients; per token they need only the (k + 1) x (k + 1) Gram matrix of
the chosen experts' outputs and y', so nothing larger than tokens x experts is ever held.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .conjugate_gradients import conjugate_gradients
from .mixture import Activation, Routing, expert_batches, expert_output
from .reduction import Reduce, alone, any_process, largest
from .segments import Segments


__all__ = ["RouterRule", "recognise_rule", "refit_router"]

CHUNK_TOKENS = 8192


class RouterRule(NamedTuple):
    """How routing weights follow from logits."""

    phi: str  # "exp" or "sigmoid"
    over_all: bool  # normalised over all experts instead of the chosen ones
    scale: float


def recognise_rule(
    rows: Tensor, routing: Routing, tolerance: float = 1e-2, reduce: Reduce = alone
) -> RouterRule | None:
    """Find the rule by which a router makes its weights.

    Args:
        rows: (N, d) router weight.
        routing: T tokens as this router sends them.
        tolerance: largest relative deviation of a weight; loose enough for bfloat16.
        reduce: over the processes that share the tokens.

    Returns:
        The rule, or None where none fits (or the router does not read what the experts read, or its weights scale
        the experts' inputs, by which the output is not linear in them).
    """
    if routing.weighs_input or rows.shape[1] != routing.hidden.shape[1]:
        return None
    logits = routing.hidden.float() @ rows.float().T  # (T, N)
    weight = routing.weight.float()
    bound, total = tolerance * largest(weight, reduce), reduce(weight.sum())
    for phi in ("exp", "sigmoid"):
        for over_all in (False, True):
            share = _shares(logits, routing.index, phi, over_all).gather(1, routing.index)  # (T, k)
            if any_process(~torch.isfinite(share).all(), reduce):
                continue
            scale = (total / reduce(share.sum())).item()
            if largest((weight - scale * share).abs(), reduce) <= bound:
                return RouterRule(phi, over_all, scale)
    return None


def refit_router(
    rows: Tensor,
    segments: Segments,
    routing: Routing,
    target: Tensor,
    activation: Activation,
    rule: RouterRule,
    ridge: float,
    iterations: int = 50,
    tolerance: float = 1e-4,
    reduce: Reduce = alone,
) -> Tensor:
    """One Gauss-Newton step of the router towards a target output.

    Args:
        rows: (N, d) router weight.
        segments: N experts.
        routing: T tokens as this router sends them.
        target: (T, o) output to reproduce.
        activation: the model's rule from pre-activations to neurons.
        rule: the router's, from `recognise_rule`.
        ridge: relative to the mean diagonal of the normal equations.
        iterations: of conjugate gradients, at most.
        tolerance: relative residual that ends them.
        reduce: over the processes that share the tokens.

    Returns:
        (N, d) new rows in the dtype of `rows`.
    """
    hidden = routing.hidden.to(target.dtype)
    logits = hidden @ rows.to(hidden).T  # (T, N)
    share = _shares(logits, routing.index, rule.phi, rule.over_all)  # (T, N)
    slope = 1 - logits.sigmoid() if rule.phi == "sigmoid" else torch.ones_like(logits)  # d log phi / dz
    share = share * slope
    weight = routing.weight.to(hidden) * slope.gather(1, routing.index)  # (T, k)
    gram, residual = _token_grams(segments, routing, target, activation)  # (T, k + 1, k + 1), (T, k + 1)

    def transposed(moments: Tensor) -> Tensor:
        """J^T of per-token moments (T, k + 1): (N, d)."""
        by_logit = torch.zeros_like(share).scatter_(1, routing.index, weight * moments[:, :-1])
        return reduce((by_logit - share * moments[:, -1:]).T @ hidden)

    def normal(step: Tensor) -> Tensor:
        """J^T J of a step (N, d)."""
        change = hidden @ step.T  # (T, N)
        chosen = weight * change.gather(1, routing.index)  # (T, k)
        moments = torch.cat([chosen, -(share * change).sum(1, keepdim=True)], dim=1)  # (T, k + 1)
        return transposed((gram @ moments.unsqueeze(-1)).squeeze(-1))

    by_logit = torch.zeros_like(share).scatter_(1, routing.index, weight**2 * gram.diagonal(dim1=1, dim2=2)[:, :-1])
    trace = (by_logit.sum(1) * hidden.square().sum(1)).sum()  # of J^T J, its cross terms with y' left out
    penalty = ridge * reduce(trace) / rows.numel()
    if not penalty > 0:
        return rows
    right = transposed(residual)
    step = conjugate_gradients(lambda v: normal(v) + penalty * v, right, iterations, tolerance, reduce)
    return (rows.to(step) + step).to(rows.dtype)


def _shares(logits: Tensor, index: Tensor, phi: str, over_all: bool) -> Tensor:
    """phi(z) normalised over the chosen experts or over all, 0 outside: (T, N)."""
    value = torch.nn.functional.logsigmoid(logits) if phi == "sigmoid" else logits
    if not over_all:
        value = torch.full_like(value, -torch.inf).scatter(1, index, value.gather(1, index))
    return value.softmax(dim=1)


def _token_grams(
    segments: Segments, routing: Routing, target: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Gram matrices of [e_1 .. e_k, y'] per token, and their products with the residual y - y'."""
    top_k, grams, products = routing.index.shape[1], [], []
    for start in range(0, max(1, len(target)), CHUNK_TOKENS):  # a process may have no tokens to fit
        part = routing.select(slice(start, start + CHUNK_TOKENS))
        outputs = target.new_zeros(len(part.index), top_k + 1, target.shape[1])  # (n, k + 1, o)
        for batch in expert_batches(segments, part, activation):
            outputs[batch.token, batch.slot] = expert_output(segments, batch)
        outputs[:, -1] = (part.weight.to(outputs).unsqueeze(1) @ outputs[:, :-1]).squeeze(1)
        residual = target[start : start + CHUNK_TOKENS] - outputs[:, -1]
        grams.append(outputs @ outputs.mT)
        products.append((outputs @ residual.unsqueeze(-1)).squeeze(-1))
    return torch.cat(grams), torch.cat(products)
