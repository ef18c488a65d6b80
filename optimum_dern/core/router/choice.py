"""Top-k rule of a router, inferred from its decisions on calibration tokens, to simulate it without some experts.

With logits z, every router whose gate weights follow a known rule (`rule.recognise_rule`) chooses the k experts of the
largest

    z,    softmax(z) + b    or    sigmoid(z) + b

with b a bias that affects only the choice, among all experts or among those of the best groups; a group is scored by
the sum of its two best experts, or by its best one.  Each of these rules is tried on the calibration tokens.  A
dropped expert is simulated by the logit -inf.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer.mixture import Routing
from ..layer.observation import ObservedLayer
from ..layer.reduction import Reduce
from .rule import AGREEMENT, RouterRule, log_masses, possible_logits, recognise_rule, share_of_tokens


__all__ = ["RouterChoice", "UnknownRouter", "choose_experts", "group_leaders", "recognise_choice"]

COMPARED = {"logit": lambda z: z, "exp": lambda z: z.softmax(dim=1), "sigmoid": torch.sigmoid}


class UnknownRouter(ValueError):
    """A router that follows none of the known rules."""


class RouterChoice(NamedTuple):
    """The rules by which a router turns logits into chosen experts and gate weights."""

    rule: RouterRule  # of the gate weights
    by: str = "logit"  # scores that are compared: "logit", "exp" (softmax) or "sigmoid"
    bias: Tensor | None = None  # (E,) added to these scores
    num_groups: int = 1
    topk_group: int = 1
    best_of_group: int = 2  # a group's score is the sum of this many best experts

    @property
    def by_groups(self) -> bool:
        """Whether groups are chosen first, and experts only of those."""
        return self.topk_group < self.num_groups


def choose_experts(logits: Tensor, choice: RouterChoice, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the top-k experts and gate weights of tokens from their router logits.

    Args:
        logits: (T, E), -inf for experts that may not be chosen.
        choice: the router's rules.
        top_k: k.

    Returns:
        (T, k) indices, and (T, k) weights; where fewer than k experts may be chosen, the rest weigh 0.
    """
    value = _compared(logits, choice)
    if choice.by_groups:
        groups = _by_group(value, choice)
        best = _best_of_groups(groups, choice).values
        judged = best.masked_fill(best == -torch.inf, 0.0).sum(2)  # a group may have lost all but one
        judged = judged.masked_fill(best[..., 0] == -torch.inf, -torch.inf)  # (T, groups)
        closed = torch.ones_like(judged, dtype=torch.bool).scatter_(1, judged.topk(choice.topk_group).indices, False)
        value = groups.masked_fill(closed.unsqueeze(2), -torch.inf).flatten(1)
    index = value.topk(top_k, dim=1).indices
    log = log_masses(logits, choice.rule.phi)
    if choice.rule.over_all:
        return index, choice.rule.scale * log.softmax(dim=1).gather(1, index)
    return index, choice.rule.scale * log.gather(1, index).softmax(dim=1)


def group_leaders(logits: Tensor, choice: RouterChoice) -> Tensor:
    """Return the experts that the scores of groups are made of.

    Args:
        logits: (T, E), -inf for experts that may not be chosen.
        choice: the router's rules.

    Returns:
        (T, groups * best_of_group) indices, none where groups are not judged.
    """
    if not choice.by_groups:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    groups = _by_group(_compared(logits, choice), choice)
    first = torch.arange(choice.num_groups, device=logits.device) * groups.shape[2]
    return (_best_of_groups(groups, choice).indices + first.unsqueeze(1)).flatten(1)


def _compared(logits: Tensor, choice: RouterChoice) -> Tensor:
    """Compute the scores (T, E) that a router compares, -inf for experts that may not be chosen."""
    value = COMPARED[choice.by](logits)
    value = value if choice.bias is None else value + choice.bias.to(value)
    return value.masked_fill(logits == -torch.inf, -torch.inf)


def _by_group(value: Tensor, choice: RouterChoice) -> Tensor:
    return value.view(len(value), choice.num_groups, value.shape[1] // choice.num_groups)  # (T, groups, E / groups)


def _best_of_groups(groups: Tensor, choice: RouterChoice) -> torch.return_types.topk:
    """Find the experts of the highest scores of every group: values and places (T, groups, best_of_group)."""
    return groups.topk(min(choice.best_of_group, groups.shape[2]), dim=2)


def recognise_choice(layer: ObservedLayer, routing: Routing) -> tuple[RouterChoice, Tensor]:
    """Infer the rules of a layer's router from its decisions on tokens.

    Args:
        layer: with the router's tensors and groups.
        routing: T tokens of this process, as routed by the model.

    Returns:
        The rules, and the router's logits (T, E) for the tokens.

    Raises:
        UnknownRouter: the router is of another kind; the message says why.
    """
    rows = layer.router_rows
    ways = [] if rows is None else list(possible_logits(rows, layer.router_bias, routing))
    if not ways:
        raise _unknown("it is no matrix that reads what the experts read, and weighs what they return")
    found = [(choice, logits) for logits in ways for choice in _choices(layer, logits, routing)]
    if not found:
        raise _unknown("its weights are neither softmax nor normalised sigmoid of its logits")
    agreements = torch.stack([_agreement(*way, routing.index, layer.reduce) for way in found]).tolist()
    best = max(range(len(found)), key=agreements.__getitem__)  # the first of equals
    if agreements[best] < AGREEMENT:
        raise _unknown("it does not choose the experts of the largest logits")
    return found[best]


def _choices(layer: ObservedLayer, logits: Tensor, routing: Routing) -> Iterator[RouterChoice]:
    """Yield every candidate rule for a router with these logits."""
    rule = recognise_rule(logits, routing, reduce=layer.reduce)
    if rule is None:
        return
    corrections = (None,) if layer.choice_bias is None else (None, layer.choice_bias)
    judged = (2, 1) if layer.topk_group < layer.num_groups else (2,)
    for bias, best, by in product(corrections, judged, COMPARED):
        yield RouterChoice(rule, by, bias, layer.num_groups, layer.topk_group, best)


def _agreement(choice: RouterChoice, logits: Tensor, index: Tensor, reduce: Reduce) -> Tensor:
    """Return the fraction () of tokens for which the rule chooses exactly the model's experts."""
    chosen, _ = choose_experts(logits, choice, index.shape[1])
    return share_of_tokens((chosen.sort(dim=1).values == index.sort(dim=1).values).all(1), reduce)


def _unknown(reason: str) -> UnknownRouter:
    return UnknownRouter(
        "selection='greedy' and method='cd_moe' compute what a router gives to other experts, but this one follows no "
        f"known rule: {reason}; choose another selection, such as 'reap' or 'hope', or method"
    )
