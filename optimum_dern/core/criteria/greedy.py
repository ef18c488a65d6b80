"""Selection of the experts whose removal changes the layer's output least (NAEE, arXiv 2402.14800).

    min over S  | F(X) - F_S(X) |_F

F is the layer's routed output, F_S the same with the logits of the experts outside S at -inf: the model's own router
then chooses and weighs among the rest.  Where there are few sets all are tried, as in the paper; where there are many,
experts are dropped one by one, each time the one without which the error is lowest (backward elimination).

All experts' outputs on all tokens would not fit into memory, so only their Gram matrix G (E, E) and inner products c
with F are kept per token: |F - F_S|^2 is |F|^2 - 2 w . c + w . G w, with w the chosen experts' gate weights.  The
memory for G limits the number of tokens: `MAX_TOKENS`, fewer for many experts (`MAX_ELEMENTS`), evenly spaced among
those that are not held out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layer.cost import Cost, LayerShape, held_by_chunk
from ..layer.mixture import Routing, expert_batches, expert_output
from ..layer.observation import ObservedLayer
from ..layer.reduction import alone
from ..router.choice import RouterChoice, choose_experts, group_leaders, recognise_choice
from ..router.rule import log_masses
from .selection import MAX_SETS, Places, all_sets, check_places, count_sets, free_experts


__all__ = ["greedy", "greedy_cost", "least_error_set"]

MAX_TOKENS = 2048  # of all processes together
MAX_ELEMENTS = 1 << 25  # of the Gram matrices of all of them


@dataclass(frozen=True)
class Trial:
    """Logits and Gram matrices from which the output error of any set of experts follows, for T tokens."""

    logits: Tensor  # (T, E)
    choice: RouterChoice
    top_k: int
    gram: Tensor  # (T, E, E) inner products of the experts' outputs
    products: Tensor  # (T, E) inner products of the experts' outputs with the layer's output
    energy: Tensor  # (T,) squared norm of the layer's output
    layer: ObservedLayer

    @property
    def independent(self) -> bool:
        """Whether dropping an expert changes the choice only of tokens that chose it or that it led a group for."""
        return self.choice.by != "exp" or self.choice.bias is None  # softmax shifts relative to the bias

    def losses(self, kept: Tensor) -> Tensor:
        """Compute |F - F_S| of several sets S (sets, n) over the tokens of all processes: (sets,) float64."""
        dropped = torch.ones(len(kept), self.logits.shape[1], dtype=torch.bool, device=self.logits.device)
        dropped.scatter_(1, kept.to(dropped.device), False)
        squares = [self._squares(self.logits.masked_fill(row, -torch.inf)).sum() for row in dropped]
        return self.layer.reduce(torch.stack(squares)).clamp(min=0).sqrt()

    def losses_without(self, dropped: Tensor) -> Tensor:
        """Compute |F - F_S| where one more expert is dropped, each in turn: (E,) float64, infinite for the dropped.

        Args:
            dropped: (E,) bool, the experts that are dropped already.
        """
        if not self.independent:
            kept = (~dropped).nonzero().flatten().tolist()
            sets = torch.tensor([[e for e in kept if e != expert] for expert in kept], dtype=torch.int64)
            losses = torch.full_like(self.products[0], torch.inf)
            return losses.masked_scatter_(~dropped, self.losses(sets))
        logits = self.logits.masked_fill(dropped, -torch.inf)
        index, weight = choose_experts(logits, self.choice, self.top_k)
        linear, quadratic = self._terms(index, weight)
        grown = 1.0  # growth of the gate weights when an expert is dropped that was not chosen
        if self.choice.rule.over_all:
            grown = 1 / (1 - log_masses(logits, self.choice.rule.phi).double().softmax(dim=1))  # (T, E)
        squares = self.energy.unsqueeze(1) - 2 * grown * linear.unsqueeze(1) + grown**2 * quadratic.unsqueeze(1)
        squares = squares.expand_as(logits).clone()
        gone = torch.cat([index, group_leaders(logits, self.choice)], dim=1)  # (T, g) experts that tokens may miss
        rows = logits.unsqueeze(1).expand(-1, gone.shape[1], -1).scatter(2, gone.unsqueeze(2), -torch.inf)  # (T, g, E)
        squares.scatter_(1, gone, self._squares(rows.flatten(0, 1), gone.shape[1]).view(gone.shape))
        losses = self.layer.reduce(squares.sum(0)).clamp(min=0).sqrt()
        return losses.masked_fill_(dropped, torch.inf)

    def _squares(self, logits: Tensor, sets: int = 1) -> Tensor:
        """Compute |F - F_S|^2 (T g,) from the logits (T g, E) of g sets for each token, masked by them."""
        linear, quadratic = self._terms(*choose_experts(logits, self.choice, self.top_k), sets)
        return (self.energy.unsqueeze(1) - 2 * linear.view(-1, sets)).flatten() + quadratic

    def _terms(self, index: Tensor, weight: Tensor, sets: int = 1) -> tuple[Tensor, Tensor]:
        """Compute w . c and w . G w of g choices for every token, (T g,) each."""
        weight, token = weight.to(self.gram), torch.arange(len(self.gram), device=index.device)
        token = token.repeat_interleave(sets, output_size=len(index))  # (T g,)
        pairs = self.gram[token[:, None, None], index.unsqueeze(2), index.unsqueeze(1)]  # (T g, k, k)
        quadratic = (weight * (pairs @ weight.unsqueeze(2)).squeeze(2)).sum(1)
        return (weight * self.products[token.unsqueeze(1), index]).sum(1), quadratic


def _trial_tokens(num_experts: int, most: int | None) -> int:
    """Return the approximate maximum number of tokens, of all processes together, that are evaluated."""
    return max(1, min(most or MAX_TOKENS, MAX_ELEMENTS // num_experts**2))


@torch.no_grad()
def greedy(layer: ObservedLayer, places: Places, most_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Select the experts whose removal changes the layer's output least.

    Args:
        layer: observed on T tokens.
        places: how many experts are retained, in how many groups, and which are protected.
        most_tokens: at most about this many tokens are evaluated, of all processes together; `MAX_TOKENS` by default.

    Returns:
        (E,) the error of dropping each expert alone, and (N,) the retained experts, ascending.

    Raises:
        ValueError: the router follows no rule that is known.
    """
    check_places(len(layer.segments.up), places)
    trial = _prepare(layer, most_tokens)
    scores = trial.losses_without(torch.zeros_like(trial.logits[0], dtype=torch.bool))
    return scores, _best_set(trial, places)


@torch.no_grad()
def least_error_set(layer: ObservedLayer, places: Places, most_tokens: int | None = None) -> Tensor:
    """Select experts as `greedy` does, without the error of dropping each expert alone: (N,), ascending."""
    check_places(len(layer.segments.up), places)
    return _best_set(_prepare(layer, most_tokens), places)


def _best_set(trial: Trial, places: Places) -> Tensor:
    """Return the set of least error (N,): of all, or where there are many by elimination."""
    num_experts = trial.logits.shape[1]
    if count_sets(num_experts, places) > MAX_SETS:
        return _eliminate(trial, places)
    sets = torch.tensor(all_sets(num_experts, places), device=trial.logits.device)  # (sets, N)
    return sets.index_select(0, trial.losses(sets).argmin().view(1))[0]


def _eliminate(trial: Trial, places: Places) -> Tensor:
    """Drop experts one by one, each time that of least error (of ties the last); return the others.

    Which one was dropped is not read by the host.
    """
    num_experts, device = trial.logits.shape[1], trial.logits.device
    size, share = num_experts // places.num_groups, places.count // places.num_groups
    free = torch.zeros(num_experts, dtype=torch.bool)
    free[sum(free_experts(num_experts, places), [])] = True
    free, dropped = free.to(device), torch.zeros(num_experts, dtype=torch.bool, device=device)
    for _ in range(num_experts - places.count):
        full = dropped.view(-1, size).sum(1, keepdim=True) == size - share  # (groups, 1): has lost its own
        candidates = free & ~dropped & ~full.expand(-1, size).flatten()
        losses = trial.losses_without(dropped).masked_fill_(~candidates, torch.inf)
        last = num_experts - 1 - losses.flip(0).argmin()
        dropped.index_fill_(0, last.view(1), True)
    return dropped.int().argsort(stable=True)[: places.count]  # those not dropped, in order


def _prepare(layer: ObservedLayer, most_tokens: int | None = None) -> Trial:
    routing, target = _sample(layer, most_tokens)
    choice, logits = recognise_choice(layer, routing)
    segments, num_experts = layer.segments, len(layer.segments.up)
    dtype = segments.compute_dtype
    gram = torch.zeros(len(target), num_experts, num_experts, dtype=torch.float64, device=target.device)
    products = gram.new_zeros(len(target), num_experts)
    chunk = max(1, segments.workspace.max_elements // (num_experts * target.shape[1]))
    everyone = torch.arange(num_experts, device=target.device)
    for start in range(0, len(target), chunk):
        part = slice(start, start + chunk)
        hidden = routing.hidden[part]
        index = everyone.expand(len(hidden), -1)
        slots = torch.arange(index.numel(), device=index.device).view(index.shape).unbind(1)  # every token, of each
        routed = Routing(hidden, index, torch.ones_like(index, dtype=dtype), slots=slots)
        outputs = target.new_zeros(len(hidden), num_experts, target.shape[1], dtype=dtype)  # (n, E, o)
        for batch in expert_batches(segments, routed, layer.activation):
            outputs[batch.token, batch.expert] = expert_output(segments, batch)
        gram[part] = outputs @ outputs.mT
        products[part] = (outputs @ target[part].to(dtype).unsqueeze(2)).squeeze(2)
    energy = target.double().square().sum(1)
    return Trial(logits, choice, routing.index.shape[1], gram, products, energy, layer)


def _sample(layer: ObservedLayer, most_tokens: int | None) -> tuple[Routing, Tensor]:
    """Sample evenly spaced tokens that are not held out; return their routing and the layer's output."""
    fitted, device = ~layer.held_out.cpu(), layer.target.device
    order = torch.arange(len(fitted)) if layer.order is None else layer.order
    asked = order.device if layer.reduce is alone else device  # only other processes need the number on a GPU
    total = int(layer.reduce(fitted.sum().to(asked)))
    step = max(1, -(-total // _trial_tokens(len(layer.segments.up), most_tokens)))
    chosen = (fitted & (order % step == 0)).nonzero().flatten().to(device)
    return layer.routing.select(chosen), layer.target[chosen]


def greedy_cost(shape: LayerShape, most_tokens: int | None = None) -> Cost:
    """Cost of `greedy`: mainly the float64 Gram matrices of all experts' outputs on a sample of the tokens."""
    tokens = min(shape.tokens, _trial_tokens(shape.experts, most_tokens))
    block = min(tokens, max(1, shape.max_elements // (shape.experts * shape.outputs)))
    outputs = block * shape.experts * (shape.outputs + shape.experts) * shape.number
    gram = 8 * tokens * shape.experts**2
    operations = 2.0 * tokens * shape.experts * (shape.expert + shape.experts * shape.outputs)
    return Cost(gram + outputs + held_by_chunk(shape._replace(tokens=tokens)), 0, operations)
