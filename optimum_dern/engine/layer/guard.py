"""Fit every candidate of a layer and keep the one that best reproduces the original layer on held-out tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from ...config import DernConfig
from ...core.router.choice import UnknownRouter
from ...methods import Candidate
from .objective import HeldOutError, Objective
from .steps import RIDGE, Scale, Step, first_refit, further_steps
from .variant import Variant


__all__ = ["Judged", "choose_variant"]


@dataclass
class Judged:
    """The best variant, the held-out errors of all variants, and the steps that could not be taken."""

    errors: dict[str, HeldOutError] = field(default_factory=dict)  # by the variants' names; plain pruning comes first
    skipped: dict[str, str] = field(default_factory=dict)  # step -> reason
    winner: Variant | None = None

    def rank(self, error: HeldOutError) -> tuple[bool, float]:
        """Return the key by which variants are ordered: those that harm no source more than pruning, then by error."""
        return error.exceeds(next(iter(self.errors.values()))), error.total

    def source_errors(self) -> dict[str, dict[str, float]]:
        """Return the errors of plain pruning and of the winner by source; none where there is only one source."""
        shown = {name: self.errors[name] for name in [*self.errors][:1] + [self.winner.name] if name in self.errors}
        sources = next(iter(shown.values())).by_source if shown else {}
        return {s: {n: error.by_source[s] for n, error in shown.items()} for s in sources} if len(sources) > 1 else {}


def choose_variant(candidates: dict[str, Candidate], objective: Objective, config: DernConfig) -> Judged:
    """Fit the candidates of a layer, judge them on held-out tokens, and choose the best.

    Args:
        candidates: by name, the method's own result last; emptied, so that the memory of the others is freed early.
        objective: what they are fitted to and judged by.
        config: `refit`, `router_refit`, `neuron_refit` and `guard` switch those steps.

    Returns:
        With the guard, the variant of the lowest relative error on the held-out tokens (plain pruning is among them,
        and wins ties) among those that have on no source of tokens a higher error than plain pruning, each further
        step taken only where it lowers the error and raises no source's above that; without the guard, the method's
        own, with every step that is asked for, fitted to all tokens.
    """
    judged = Judged()
    steps = list(further_steps(config))
    if not config.guard:
        origin, candidate = list(candidates.items())[-1]
        variant = _unfitted(origin, candidate, objective, config)
        first = [first_refit(config)] if config.refit else []
        for step in [*first, *steps]:
            variant = _taken(step, variant, objective, judged)
        judged.winner = variant
        return judged

    finalists = _finalists(candidates, objective, config, judged)
    results = []
    while finalists:  # popped, so that the weights that a step replaces are freed
        results.append(_refined(steps, *finalists.pop(0), objective, judged))
    judged.winner = min(results, key=lambda result: judged.rank(result[0]))[1]  # the first of equals
    return judged


def _finalists(
    candidates: dict[str, Candidate], objective: Objective, config: DernConfig, judged: Judged
) -> list[tuple[HeldOutError, Variant]]:
    """Find the best first variant of every set of retained experts; returns them with their held-out errors."""
    best: dict[tuple[int, ...], tuple[HeldOutError, Variant]] = {}
    for origin in list(candidates):
        candidate = candidates.pop(origin)
        kept = tuple(candidate.retained.tolist())
        for error, variant in _first_variants(origin, candidate, objective, config, judged):
            if kept not in best or judged.rank(error) < judged.rank(best[kept][0]):
                best[kept] = error, variant
    return list(best.values())


def _first_variants(
    origin: str, candidate: Candidate, objective: Objective, config: DernConfig, judged: Judged
) -> Iterator[tuple[HeldOutError, Variant]]:
    """Yield a candidate unfitted, with scaled expert outputs, and the better of both refitted, each with its error."""
    plain = _unfitted(origin, candidate, objective, config)
    yield (error := _judge(plain, objective, judged)), plain
    if config.refit:
        scaled = Scale()(plain, objective)
        yield (scaled_error := _judge(scaled, objective, judged)), scaled
        better = scaled if scaled_error.total < error.total else plain
        refitted = first_refit(config)(replace(better, steps=()), objective)
        yield _judge(refitted, objective, judged), refitted


def _refined(
    steps: Iterable[Step], error: HeldOutError, variant: Variant, objective: Objective, judged: Judged
) -> tuple[HeldOutError, Variant]:
    """Take each step that makes the variant rank higher; returns its held-out error and the variant."""
    for step in steps:
        made = _taken(step, variant, objective, judged)
        if made is not variant and judged.rank(found := _judge(made, objective, judged)) < judged.rank(error):
            error, variant = found, made
    return error, variant


def _taken(step: Step, variant: Variant, objective: Objective, judged: Judged) -> Variant:
    """Apply a step to a variant; where the router does not allow it, note the reason and return the same variant."""
    try:
        return step(variant, objective)
    except UnknownRouter as reason:
        judged.skipped["router refit"] = str(reason)
        return variant


def _unfitted(origin: str, candidate: Candidate, objective: Objective, config: DernConfig) -> Variant:
    routing = objective.measured.reroute(candidate)
    return Variant(origin, candidate, routing, candidate.segments, config.refit_ridge or RIDGE)


def _judge(variant: Variant, objective: Objective, judged: Judged) -> HeldOutError:
    error = objective.error(variant)
    known = judged.errors.setdefault(variant.name, error)  # the ridge is not in the name
    judged.errors[variant.name] = min(known, error, key=judged.rank)
    return error
