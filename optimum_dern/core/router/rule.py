"""Gate weight rule of a router (softmax or sigmoid, normalisation, scale), inferred from calibration tokens.

Most routers compute gate weights of the form

    g_s = scale * phi(z_s) / sum over r in R of phi(z_r),        z = W x (+ b),

with phi = exp or sigmoid and R the chosen experts or all of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..layer.mixture import Routing
from ..layer.reduction import Reduce, alone, largest


__all__ = [
    "AGREEMENT",
    "RouterRule",
    "log_masses",
    "possible_logits",
    "recognise_rule",
    "share_of_tokens",
    "weight_shares",
]

AGREEMENT = 0.99  # fraction of tokens that a rule must explain; not all, because rounding breaks ties
TOLERANCE = 1e-2  # largest deviation of a weight, relative to the largest one; loose enough for weights in bfloat16


class RouterRule(NamedTuple):
    """The rule by which a router computes gate weights from logits."""

    phi: str  # "exp" or "sigmoid"
    over_all: bool  # normalised over all experts instead of the chosen ones
    scale: float


def possible_logits(rows: Tensor, bias: Tensor | None, routing: Routing) -> Iterator[Tensor]:
    """Compute a router's logits in each precision that the model may use.

    Args:
        rows: (N, d) router weight.
        bias: (N,) added to the logits, where the router has one.
        routing: T tokens.

    Yields:
        (T, N) logits computed in float32 (or wider); then those computed in the dtype of `rows`, if that is narrower.
        Nothing if the router and the experts have different inputs, or if gate weights scale the experts' inputs, so
        that the output is not linear in them.
    """
    if routing.weighs_input or rows.shape[1] != routing.hidden.shape[1]:
        return
    for dtype in (torch.promote_types(rows.dtype, torch.float32), rows.dtype):
        logits = linear(routing.hidden.to(dtype), rows.to(dtype), None if bias is None else bias.to(dtype))
        yield logits.to(torch.promote_types(dtype, torch.float32))
        if dtype == rows.dtype:
            return


def recognise_rule(logits: Tensor, routing: Routing, reduce: Reduce = alone) -> RouterRule | None:
    """Infer the rule by which a router computes gate weights from logits.

    Args:
        logits: (T, N) router logits.
        routing: T tokens as routed by this router.
        reduce: over the processes that share the tokens.

    Returns:
        The rule that explains the gate weights of nearly all tokens (`AGREEMENT`), or None.
    """
    weight = routing.weight.to(logits.dtype)
    bound, total = TOLERANCE * largest(weight, reduce), reduce(weight.sum())
    for phi in ("exp", "sigmoid"):
        for over_all in (False, True):
            share = weight_shares(logits, routing.index, phi, over_all).gather(1, routing.index)  # (T, k)
            scale = total / reduce(share.sum())  # not a number where a share is not finite: explains no token then
            explained = share_of_tokens(((weight - scale * share).abs() <= bound).all(1), reduce)
            scale, explained = torch.stack([scale.double(), explained]).tolist()  # the host waits once
            if explained >= AGREEMENT:
                return RouterRule(phi, over_all, scale)
    return None


def share_of_tokens(holds: Tensor, reduce: Reduce = alone) -> Tensor:
    """Return the fraction () float64 of True entries of a mask (T,) over the tokens of all processes."""
    true, tokens = reduce(torch.stack([holds.sum(), torch.ones_like(holds).sum()]).double())
    return true / tokens.clamp(min=1)


def log_masses(logits: Tensor, phi: str) -> Tensor:
    """Compute log phi(z) of the logits, the logarithm of the unnormalised gate weights: (T, N)."""
    return torch.nn.functional.logsigmoid(logits) if phi == "sigmoid" else logits


def weight_shares(logits: Tensor, index: Tensor, phi: str, over_all: bool) -> Tensor:
    """Normalise phi(z) over the chosen experts (T, k) or over all; return (T, N), 0 outside."""
    value = log_masses(logits, phi)
    if not over_all:
        value = torch.full_like(value, -torch.inf).scatter(1, index, value.gather(1, index))
    return value.softmax(dim=1)
