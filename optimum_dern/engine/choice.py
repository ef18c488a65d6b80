"""Refit every candidate of a layer and keep the one that best reproduces the original layer on held-out tokens."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import DernConfig
from ..core.mixture import Activation, Routing, routed_output
from ..core.refit import refit_down
from ..core.router_refit import recognise_rule, refit_router
from ..methods import Candidate


__all__ = ["Choice", "LayerTask", "choose_candidate"]

ROUTER_ROUNDS = 4  # alternations of router and down projections; later ones gain little


@dataclass(frozen=True)
class LayerTask:
    """What candidates of a layer are fitted to and judged by."""

    target: Tensor  # (T, o) the original layer's routed output
    held_out: Tensor  # (T,) bool: tokens that judge; the others are fitted
    activation: Activation
    router_rows: Tensor | None  # (N, d) of the retained experts, where the router has one matrix
    reroute: Callable[[Candidate], Routing]  # the same T tokens once a candidate's router is in place


@dataclass(frozen=True)
class Variant:
    """A candidate, as it is or refitted."""

    name: str
    candidate: Candidate
    routing: Routing  # T tokens, by the candidate's router
    source: Candidate  # before any refit


@dataclass(frozen=True)
class Choice:
    """The candidate to write."""

    name: str
    candidate: Candidate
    errors: dict[str, float]  # of every variant that was judged
    facts: dict[str, object]  # of all candidates together


def choose_candidate(candidates: Mapping[str, Candidate], task: LayerTask, config: DernConfig) -> Choice:
    """Refit, judge and choose.

    Args:
        candidates: by name, the method's own result last.
        task: what they are fitted to and judged by.
        config: `refit`, `router_refit` and `guard` switch those steps.

    Returns:
        With the guard, the variant of the lowest relative error on the held-out tokens (plain pruning is among them,
        and wins ties); without it, the method's own, refitted on all tokens if asked.
    """
    facts = {name: value for candidate in candidates.values() for name, value in candidate.facts.items()}
    if not config.guard:
        name, candidate = list(candidates.items())[-1]
        everything = torch.ones_like(task.held_out)
        *_, last = _variants(name, candidate, task, everything, config)
        if config.refit and config.router_refit:
            last = _refit_router(last, task, everything, config) or last
        return Choice(last.name, last.candidate, {}, facts)

    errors: dict[str, float] = {}
    judged: list[Variant] = []

    def judge(variant: Variant) -> None:
        routing = variant.routing.select(task.held_out)
        output = routed_output(variant.candidate.segments, routing, task.activation)
        errors[variant.name] = relative_error(output, task.target[task.held_out])
        judged.append(variant)

    for name, candidate in candidates.items():
        for variant in _variants(name, candidate, task, ~task.held_out, config):
            judge(variant)
    best = min(judged, key=lambda variant: errors[variant.name])  # the first of equals
    if config.refit and config.router_refit:
        refitted = [variant for variant in judged if variant.name.endswith("+refit")]
        start = min(refitted, key=lambda variant: errors[variant.name])
        if (routed := _refit_router(start, task, ~task.held_out, config)) is not None:
            judge(routed)
            best = min(best, routed, key=lambda variant: errors[variant.name])
    return Choice(best.name, best.candidate, errors, facts)


def relative_error(output: Tensor, target: Tensor) -> float:
    """|output - target|^2 / |target|^2, summed over all tokens."""
    return ((output - target).double().square().sum() / target.double().square().sum().clamp(min=1e-30)).item()


def _variants(
    name: str, candidate: Candidate, task: LayerTask, fitted: Tensor, config: DernConfig
) -> Iterator[Variant]:
    """A candidate as it is, and with its down projections refitted."""
    routing = task.reroute(candidate)
    yield Variant(name, candidate, routing, candidate)
    if config.refit:
        refitted = _refit_down(candidate, routing, task, fitted, config.refit_ridge, config.refit_sweeps)
        yield Variant(f"{name}+refit", refitted, routing, candidate)


def _refit_router(variant: Variant, task: LayerTask, fitted: Tensor, config: DernConfig) -> Variant | None:
    """Router and down projections refitted in turn; None where the router follows no rule that is known."""
    rows = task.router_rows if variant.candidate.router_rows is None else variant.candidate.router_rows
    rule = None if rows is None else recognise_rule(rows, variant.routing)
    if rule is None:
        return None
    candidate, routing = variant.candidate, variant.routing
    for _ in range(ROUTER_ROUNDS):
        data = (candidate.segments, routing.select(fitted), task.target[fitted], task.activation)
        rows = refit_router(rows, *data, rule, config.refit_ridge)
        routing = task.reroute(replace(variant.source, router_rows=rows))
        start = candidate.segments.down
        candidate = _refit_down(variant.source, routing, task, fitted, config.refit_ridge, 1, start)
    return Variant(f"{variant.name}+router", replace(candidate, router_rows=rows), routing, variant.source)


def _refit_down(
    source: Candidate,
    routing: Routing,
    task: LayerTask,
    fitted: Tensor,
    ridge: float,
    sweeps: int,
    start: Tensor | None = None,
) -> Candidate:
    data = (routing.select(fitted), task.target[fitted], task.activation)
    return replace(source, segments=refit_down(source.segments, *data, ridge, sweeps, start))
