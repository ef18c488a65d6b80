"""Fit every candidate of a layer and keep the one that best reproduces the original layer on held-out tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...config import DernConfig
from ...core.router.choice import UnknownRouter
from ...methods import Candidate
from .objective import Objective
from .steps import Scale, Step, first_steps, further_steps
from .variant import HeldOutError, Variant


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
        and wins ties) among those that have on no source of tokens a higher error than plain pruning: every candidate
        takes the first steps, the best one the further steps, each only where it lowers the error and raises no
        source's above that.  Without the guard, the method's own, with every step that is asked for, fitted to all
        tokens.
    """
    judged, first, further = Judged(), first_steps(config), list(further_steps(config))
    if not config.guard:
        origin, candidate = list(candidates.items())[-1]
        variant = _unfitted(origin, candidate, objective)
        for step in [*(step for step in first if not isinstance(step, Scale)), *further]:
            variant = next(_made(step, variant, objective, judged), variant)
        judged.winner = variant
        return judged

    judged.winner = _refined(further, _best_first(candidates, first, objective, judged), objective, judged)
    return judged


def _best_first(
    candidates: dict[str, Candidate], steps: Sequence[Step], objective: Objective, judged: Judged
) -> Variant:
    """Take the first steps with every candidate, and return the best variant."""
    best: Variant | None = None
    for origin in list(candidates):
        variant = _judged(_unfitted(origin, candidates.pop(origin), objective), objective, judged)
        found = _refined(steps, variant, objective, judged)
        if best is None or judged.rank(found.error) < judged.rank(best.error):  # the first of equals
            best = found
    return best


def _refined(steps: Iterable[Step], variant: Variant, objective: Objective, judged: Judged) -> Variant:
    """Take each step that makes a judged variant rank higher, and return the variant, judged."""
    for step in steps:
        for made in _made(step, variant, objective, judged):
            made = _judged(made, objective, judged)
            if judged.rank(made.error) < judged.rank(variant.error):
                variant = made
    return variant


def _made(step: Step, variant: Variant, objective: Objective, judged: Judged) -> Iterator[Variant]:
    """Yield what a step makes of a variant; where the router does not allow it, only note the reason."""
    try:
        yield from step(variant, objective)
    except UnknownRouter as reason:
        judged.skipped["router refit"] = str(reason)


def _unfitted(origin: str, candidate: Candidate, objective: Objective) -> Variant:
    return Variant(origin, candidate, objective.measured.reroute(candidate))


def _judged(variant: Variant, objective: Objective, judged: Judged) -> Variant:
    """Return the variant with its error, which is also noted."""
    error = objective.error(variant)
    known = judged.errors.setdefault(variant.name, error)  # the ridge is not in the name
    judged.errors[variant.name] = min(known, error, key=judged.rank)
    return replace(variant, error=error)
