"""Refit every candidate of a layer and keep the one that best reproduces the original layer on held-out tokens."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import DernConfig
from ..core.mixture import Activation, Routing, routed_output
from ..core.neuron_refit import refit_neurons
from ..core.output_scale import fit_scales, scale_outputs
from ..core.reduction import Reduce, alone
from ..core.refit import refit_down
from ..core.router_refit import refit_router
from ..core.router_rule import possible_logits, recognise_rule
from ..methods import Candidate


__all__ = ["Choice", "LayerTask", "choose_candidate"]

RIDGE = 1e-2  # of the first fit where the config leaves it open
RIDGES = (1e-3, 1e-1)  # then tried instead


@dataclass(frozen=True)
class LayerTask:
    """What candidates of a layer are fitted to and judged by."""

    target: Tensor  # (T, o) the original layer's routed output, or what else is wanted, times the weight of tokens
    held_out: Tensor  # (T,) bool: tokens that judge; the others are fitted
    enough: Tensor  # (T,) bool: of those, the ones that closed forms see
    activation: Activation
    router: Callable[[Candidate], tuple[Tensor, Tensor | None] | None]  # its rows and bias, where it is one matrix
    reroute: Callable[[Candidate], Routing]  # the same T tokens once a candidate's router is in place
    reduce: Reduce = alone  # over the processes, each of which has its own T tokens
    order: Tensor | None = None  # (T,) number of each token among those of all processes
    token_weight: Tensor | None = None  # (T, 1) by which an error counts; all alike by default

    def select(self, routing: Routing, tokens: Tensor) -> tuple[Routing, Tensor, Activation]:
        """Routing and target of some tokens, (T,) bool, both times the tokens' weights."""
        chosen = routing.select(tokens)
        if self.token_weight is not None:
            chosen = chosen._replace(weight=chosen.weight * self.token_weight[tokens].to(chosen.weight))
        return chosen, self.target[tokens], self.activation


@dataclass(frozen=True)
class Variant:
    """A candidate, as it is or refitted."""

    name: str
    candidate: Candidate
    routing: Routing  # T tokens, by the candidate's router
    source: Candidate  # before the refit of the down projections
    ridge: float = RIDGE


Step = Callable[[Variant, LayerTask], Variant | None]  # the variant after it, None where it cannot be taken


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
        last = Variant(name, candidate, task.reroute(candidate), candidate, config.refit_ridge or RIDGE)
        last = _refitted(last, task, config.refit_sweeps) if config.refit else last
        for step in _steps(config):
            last = step(last, task) or last
        return Choice(last.name, last.candidate, {}, facts)

    best, errors = _guarded(candidates, task, config)
    return Choice(best.name, best.candidate, errors, facts)


def _guarded(
    candidates: Mapping[str, Candidate], task: LayerTask, config: DernConfig
) -> tuple[Variant, dict[str, float]]:
    """The best variant, and the errors of all."""
    errors: dict[str, float] = {}

    def judge(variant: Variant) -> float:
        routing, target, activation = task.select(variant.routing, task.held_out)
        error = relative_error(routed_output(variant.candidate.segments, routing, activation), target, task.reduce)
        errors[variant.name] = min(error, errors.get(variant.name, error))  # a step may be tried several times
        return error

    finalists: dict[tuple[int, ...] | None, tuple[float, Variant]] = {}  # one of every set of retained experts
    for name, candidate in candidates.items():
        kept = None if candidate.retained is None else tuple(candidate.retained.tolist())
        for error, variant in _variants(name, candidate, task, config, judge):
            if kept not in finalists or error < finalists[kept][0]:
                finalists[kept] = error, variant
    for kept, (error, best) in finalists.items():
        for step in [*_ridge_steps(config), *_steps(config)]:
            variant = step(best, task)
            lower = error if variant is None else judge(variant)
            if lower < error:
                error, best = lower, variant
        finalists[kept] = error, best
    return min(finalists.values(), key=lambda pair: pair[0])[1], errors  # the first of equals


def relative_error(output: Tensor, target: Tensor, reduce: Reduce = alone) -> float:
    """|output - target|^2 / |target|^2, summed over all tokens; infinite where the output is not finite."""
    error, total = reduce((output - target).double().square().sum()), reduce(target.double().square().sum())
    return (error / total.clamp(min=1e-30)).nan_to_num(torch.inf).item()


def _variants(
    name: str, candidate: Candidate, task: LayerTask, config: DernConfig, judge: Callable[[Variant], float]
) -> Iterator[tuple[float, Variant]]:
    """A candidate as it is, with its experts' outputs scaled, and the better of these with a refit; their errors."""
    plain = Variant(name, candidate, task.reroute(candidate), candidate, config.refit_ridge or RIDGE)
    yield (error := judge(plain)), plain
    if config.refit:
        scaled = _scaled(plain, task)
        yield (scaled_error := judge(scaled)), scaled
        better = scaled if scaled_error < error else plain
        sweeps = 1 if config.neuron_refit else config.refit_sweeps  # the neurons' refit goes on from there
        refitted = _refitted(replace(better, name=name), task, sweeps)
        yield judge(refitted), refitted


def _steps(config: DernConfig) -> list[Step]:
    """The further steps that a config asks for."""
    router = [_router_step] if config.refit and config.router_refit else []
    neurons = [_neuron_step] if config.refit and config.neuron_refit else []
    return router + neurons


def _ridge_steps(config: DernConfig) -> list[Step]:
    """Other ridges of the refit, where the config leaves it open and nothing comes after it that makes up for it."""
    if not config.refit or config.neuron_refit or config.refit_ridge is not None:
        return []

    def refit_with(ridge: float) -> Step:
        return lambda variant, task: _refitted(replace(variant, ridge=ridge), task, 1) if "+" in variant.name else None

    return [refit_with(ridge) for ridge in RIDGES]


def _scaled(variant: Variant, task: LayerTask) -> Variant:
    """Every expert's output times the factor that fits the target best."""
    scales = fit_scales(variant.candidate.segments, *task.select(variant.routing, task.enough), task.reduce)
    candidate = replace(variant.candidate, segments=scale_outputs(variant.candidate.segments, scales))
    return replace(variant, name=f"{variant.name}+scale", candidate=candidate, source=candidate)


def _refitted(variant: Variant, task: LayerTask, sweeps: int) -> Variant:
    """The down projections, from where they are, near those of the source."""
    start, source = variant.candidate.segments.down, variant.source
    data = task.select(variant.routing, task.enough)
    segments = refit_down(source.segments, *data, variant.ridge, sweeps, start, task.reduce)
    return replace(variant, name=_with_suffix(variant.name, "refit"), candidate=replace(source, segments=segments))


def _router_step(variant: Variant, task: LayerTask) -> Variant | None:
    """The router, then the down projections for it; None where the router follows no rule that is known."""
    candidate = variant.candidate
    router = task.router(candidate)
    if router is None:
        return None
    rows, bias = router
    logits = possible_logits(rows, bias, variant.routing)
    rules = (recognise_rule(z, variant.routing, reduce=task.reduce) for z in logits)
    rule = next((rule for rule in rules if rule is not None), None)
    if rule is None:
        return None
    data = task.select(variant.routing, task.enough)
    rows = refit_router(rows, candidate.segments, *data, rule, variant.ridge, bias=bias, reduce=task.reduce)
    moved = replace(
        variant,
        name=_with_suffix(variant.name, "router"),
        candidate=replace(candidate, router_rows=rows),
        routing=task.reroute(replace(candidate, router_rows=rows)),
        source=replace(variant.source, router_rows=rows),
    )
    return _refitted(moved, task, 1)


def _neuron_step(variant: Variant, task: LayerTask) -> Variant:
    """All projections together."""
    order = None if task.order is None else task.order[~task.held_out.to(task.order.device)]
    data = task.select(variant.routing, ~task.held_out)
    segments = refit_neurons(variant.candidate.segments, *data, order=order, reduce=task.reduce)
    candidate = replace(variant.candidate, segments=segments)
    return replace(variant, name=_with_suffix(variant.name, "neurons"), candidate=candidate, source=candidate)


def _with_suffix(name: str, suffix: str) -> str:
    """Name of a variant after a step: every step fits the down projections as well."""
    base, *done = name.split("+")
    done = [step for step in done if step != "scale"]
    return "+".join([base, *dict.fromkeys(["refit", *done, suffix])])
