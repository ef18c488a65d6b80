"""Refit every candidate of a layer and keep the one that best reproduces the original layer on held-out tokens."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import DernConfig
from ..core.mixture import Activation, Routing, routed_output
from ..core.neuron_refit import refit_neurons
from ..core.reduction import Reduce, alone
from ..core.refit import refit_down
from ..core.router_refit import recognise_rule, refit_router
from ..methods import Candidate


__all__ = ["Choice", "LayerTask", "choose_candidate"]

ROUNDS = 3  # of the steps of router and neurons in turn; later ones gain little
WORTHWHILE = 0.005  # a step that lowers the error by less is not tried again on its layer


@dataclass(frozen=True)
class LayerTask:
    """What candidates of a layer are fitted to and judged by."""

    target: Tensor  # (T, o) the original layer's routed output
    held_out: Tensor  # (T,) bool: tokens that judge; the others are fitted
    activation: Activation
    router_rows: Tensor | None  # (N, d) of the retained experts, where the router has one matrix
    reroute: Callable[[Candidate], Routing]  # the same T tokens once a candidate's router is in place
    reduce: Reduce = alone  # over the processes, each of which has its own T tokens


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
        config: `refit`, `router_refit`, `neuron_refit` and `guard` switch those steps.

    Returns:
        With the guard, the variant of the lowest relative error on the held-out tokens (plain pruning is among them,
        and wins ties), each further step taken only where it lowers that error; without it, the method's own, with
        every step that is asked for, fitted to all tokens.
    """
    facts = {name: value for candidate in candidates.values() for name, value in candidate.facts.items()}
    if not config.guard:
        name, candidate = list(candidates.items())[-1]
        *_, last = _variants(name, candidate, task, config)
        for step in _steps(config) * ROUNDS:
            last = step(last, task, config) or last
        return Choice(last.name, last.candidate, {}, facts)

    errors: dict[str, float] = {}

    def judge(variant: Variant) -> float:
        routing = variant.routing.select(task.held_out)
        output = routed_output(variant.candidate.segments, routing, task.activation)
        error = relative_error(output, task.target[task.held_out], task.reduce)
        errors[variant.name] = min(error, errors.get(variant.name, error))  # a step may be tried several times
        return error

    judged = [
        (judge(variant), variant)
        for name, candidate in candidates.items()
        for variant in _variants(name, candidate, task, config)
    ]
    error, best = min(judged, key=lambda pair: pair[0])  # the first of equals
    steps = _steps(config)
    for step in steps * ROUNDS:
        variant = step(best, task, config) if step in steps else None
        lower = error if variant is None else judge(variant)
        if lower > (1 - WORTHWHILE) * error and step in steps:
            steps.remove(step)  # it will not help the next time either
        if lower < error:
            error, best = lower, variant
    return Choice(best.name, best.candidate, errors, facts)


def relative_error(output: Tensor, target: Tensor, reduce: Reduce = alone) -> float:
    """|output - target|^2 / |target|^2, summed over all tokens; infinite where the output is not finite."""
    error, total = reduce((output - target).double().square().sum()), reduce(target.double().square().sum())
    return (error / total.clamp(min=1e-30)).nan_to_num(torch.inf).item()


def _variants(name: str, candidate: Candidate, task: LayerTask, config: DernConfig) -> Iterator[Variant]:
    """A candidate as it is, and with its down projections refitted."""
    routing = task.reroute(candidate)
    yield Variant(name, candidate, routing, candidate)
    if config.refit:
        refitted = _refit_down(candidate, routing, task, config.refit_ridge, config.refit_sweeps)
        yield Variant(f"{name}+refit", refitted, routing, candidate)


def _steps(config: DernConfig) -> list[Callable[[Variant, LayerTask, DernConfig], Variant | None]]:
    """The further steps that a config asks for."""
    router = [_router_step] if config.refit and config.router_refit else []
    neurons = [_neuron_step] if config.refit and config.neuron_refit else []
    return router + neurons


def _router_step(variant: Variant, task: LayerTask, config: DernConfig) -> Variant | None:
    """The router, then the down projections for it; None where the router follows no rule that is known."""
    candidate = variant.candidate
    rows = task.router_rows if candidate.router_rows is None else candidate.router_rows
    rule = None if rows is None else recognise_rule(rows, variant.routing, reduce=task.reduce)
    if rule is None:
        return None
    data = _fitted(variant.routing, task)
    rows = refit_router(rows, candidate.segments, *data, rule, config.refit_ridge, reduce=task.reduce)
    source = replace(variant.source, router_rows=rows)
    routing = task.reroute(source)
    refitted = _refit_down(source, routing, task, config.refit_ridge, 1, candidate.segments.down)
    return Variant(_with_suffix(variant.name, "router"), refitted, routing, source)


def _neuron_step(variant: Variant, task: LayerTask, config: DernConfig) -> Variant:
    """Gate and up projections, then the down projections for them."""
    data = _fitted(variant.routing, task)
    segments = refit_neurons(variant.candidate.segments, *data, config.refit_ridge, reduce=task.reduce)
    source = replace(variant.source, segments=segments._replace(down=variant.source.segments.down))
    refitted = _refit_down(source, variant.routing, task, config.refit_ridge, 1, segments.down)
    return Variant(_with_suffix(variant.name, "neurons"), refitted, variant.routing, source)


def _refit_down(
    source: Candidate, routing: Routing, task: LayerTask, ridge: float, sweeps: int, start: Tensor | None = None
) -> Candidate:
    data = _fitted(routing, task)
    return replace(source, segments=refit_down(source.segments, *data, ridge, sweeps, start, task.reduce))


def _fitted(routing: Routing, task: LayerTask) -> tuple[Routing, Tensor, Activation]:
    """What a fit may see: the tokens that are not held out."""
    return routing.select(~task.held_out), task.target[~task.held_out], task.activation


def _with_suffix(name: str, suffix: str) -> str:
    """Name of a variant after a step: every step refits the down projections as well."""
    base, *done = name.split("+")
    return "+".join([base, *dict.fromkeys(["refit", *done, suffix])])
