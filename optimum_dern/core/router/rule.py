"""The form of a router's weights, recognised from what it does on the calibration tokens.

Most routers apply weights of one form,

    g_s = scale * phi(z_s) / sum over r in R of phi(z_r),        z = W x (+ b),

with phi = exp or sigmoid and R the chosen experts or all of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..layer.mixture import Routing
from ..layer.reduction import Reduce, alone, any_process, largest


__all__ = [
    "AGREEMENT",
    "RouterRule",
    "log_masses",
    "possible_logits",
    "recognise_rule",
    "share_of_tokens",
    "weight_shares",
]

AGREEMENT = 0.99  # share of the tokens with which a rule has to agree: rounding breaks ties


class RouterRule(NamedTuple):
    """How routing weights follow from logits."""

    phi: str  # "exp" or "sigmoid"
    over_all: bool  # normalised over all experts instead of the chosen ones
    scale: float


def possible_logits(rows: Tensor, bias: Tensor | None, routing: Routing) -> Iterator[Tensor]:
    """A router's logits in every precision in which a model may compute them.

    Args:
        rows: (N, d) router weight.
        bias: (N,) added to the logits, where the router has one.
        routing: T tokens.

    Yields:
        (T, N) in float32 at least, as computed there; then as computed, and rounded, in the dtype of `rows` where
        that is a shorter one.  Nothing where the router does not read what the experts read, or its weights scale
        the experts' inputs, by which the output is not linear in them.
    """
    if routing.weighs_input or rows.shape[1] != routing.hidden.shape[1]:
        return
    for dtype in (torch.promote_types(rows.dtype, torch.float32), rows.dtype):
        logits = linear(routing.hidden.to(dtype), rows.to(dtype), None if bias is None else bias.to(dtype))
        yield logits.to(torch.promote_types(dtype, torch.float32))
        if dtype == rows.dtype:
            return


def recognise_rule(
    logits: Tensor, routing: Routing, tolerance: float = 1e-2, reduce: Reduce = alone
) -> RouterRule | None:
    """Find the rule by which a router makes its weights.

    Args:
        logits: (T, N) the router's.
        routing: T tokens as this router sends them.
        tolerance: largest deviation of a weight, relative to the largest weight; loose enough for weights in bfloat16.
        reduce: over the processes that share the tokens.

    Returns:
        The rule with which the weights of nearly all tokens agree (`AGREEMENT`), or None where none does.
    """
    weight = routing.weight.to(logits.dtype)
    bound, total = tolerance * largest(weight, reduce), reduce(weight.sum())
    for phi in ("exp", "sigmoid"):
        for over_all in (False, True):
            share = weight_shares(logits, routing.index, phi, over_all).gather(1, routing.index)  # (T, k)
            if any_process(~torch.isfinite(share).all(), reduce):
                continue
            scale = (total / reduce(share.sum())).item()
            if share_of_tokens(((weight - scale * share).abs() <= bound).all(1), reduce) >= AGREEMENT:
                return RouterRule(phi, over_all, scale)
    return None


def share_of_tokens(holds: Tensor, reduce: Reduce = alone) -> float:
    """Of how many of all processes' tokens something holds, (T,) bool."""
    counts = torch.stack([holds.sum(), holds.new_tensor(len(holds), dtype=torch.long)]).double()
    true, tokens = reduce(counts).tolist()
    return true / max(tokens, 1)


def log_masses(logits: Tensor, phi: str) -> Tensor:
    """log phi(z), the logarithms of the numbers whose shares are the weights: (T, N)."""
    return torch.nn.functional.logsigmoid(logits) if phi == "sigmoid" else logits


def weight_shares(logits: Tensor, index: Tensor, phi: str, over_all: bool) -> Tensor:
    """phi(z) normalised over the chosen experts (T, k) or over all, 0 outside: (T, N)."""
    value = log_masses(logits, phi)
    if not over_all:
        value = torch.full_like(value, -torch.inf).scatter(1, index, value.gather(1, index))
    return value.softmax(dim=1)
