"""The steps that fit a candidate to the original layer's output, and the memory and operations that each takes.

A step is called with a variant and the objective, and returns a new variant.  Every step but the scale ends with
refitted down projections, so that "refit" is among the steps of the variants that it returns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ...config import DernConfig
from ...core.layer.cost import Cost, LayerShape
from ...core.refits.down_projections import refit_down, refit_down_cost
from ...core.refits.neurons import count_passes, descend_neurons, descend_neurons_cost
from ...core.refits.output_scale import fit_scales, fit_scales_cost, scale_outputs
from ...core.refits.router import refit_router, refit_router_cost
from ...core.router.choice import UnknownRouter
from ...core.router.rule import possible_logits, recognise_rule
from ...data.labels import enough_tokens
from .objective import Objective
from .variant import Variant


__all__ = [
    "RIDGE",
    "RIDGES",
    "DownRefit",
    "NeuronRefit",
    "OtherRidge",
    "RouterRefit",
    "Scale",
    "Step",
    "first_refit",
    "further_steps",
    "sampled_tokens",
]

RIDGE = 1e-2  # of the first refit where the config sets none
RIDGES = (1e-3, 1e-1)  # tried afterwards, each kept where it lowers the held-out error
WORTH_A_PASS = 0.01  # relative fall of the held-out error for which the neuron refit goes on
UNJUDGED_PASSES = 4  # of the neuron refit, where no token is held out


class Step(Protocol):
    """A step that fits a variant to the objective."""

    sampled: bool  # whether it uses only the tokens sampled for closed-form refits, or all tokens for fitting

    def __call__(self, variant: Variant, objective: Objective) -> Variant:
        """Return the variant after the step; raises `UnknownRouter` where the router does not allow the step."""

    def costs(self, shape: LayerShape) -> list[Cost]:
        """List the costs of its parts, in order, without the memory of the candidates and the tokens."""


@dataclass(frozen=True)
class Scale:
    """Step that scales every expert's output by the factor that fits the target best (least squares)."""

    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Variant:
        data = objective.data(variant.routing, objective.sampled)
        segments = variant.candidate.segments
        segments = scale_outputs(segments, fit_scales(segments, *data, objective.reduce))
        candidate = replace(variant.candidate, segments=segments)
        return replace(variant, candidate=candidate, anchor=segments, steps=("scale",))

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [fit_scales_cost(shape)]


@dataclass(frozen=True)
class DownRefit:
    """Step that refits the down projections in closed form, regularised towards those of the variant's anchor."""

    sweeps: int = 1
    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Variant:
        data = objective.data(variant.routing, objective.sampled)
        start, reduce = variant.candidate.segments.down, objective.reduce
        segments = refit_down(variant.anchor, *data, variant.ridge, self.sweeps, start, reduce)
        return variant.after(segments=segments)

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [refit_down_cost(shape, self.sweeps)]


@dataclass(frozen=True)
class OtherRidge:
    """Step that refits already refitted down projections with another ridge; other variants stay as they are."""

    ridge: float
    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Variant:
        return DownRefit()(replace(variant, ridge=self.ridge), objective) if variant.steps else variant

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [refit_down_cost(shape, sweeps=1)]


@dataclass(frozen=True)
class RouterRefit:
    """Step that refits the router's rows by a Gauss-Newton step, then the down projections for the new routing."""

    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Variant:
        candidate, reduce = variant.candidate, objective.reduce
        router = objective.measured.router_of(candidate)
        if router is None:
            raise UnknownRouter("the router has no single matrix")
        rows, bias = router
        logits = possible_logits(rows, bias, variant.routing)
        rules = (recognise_rule(z, variant.routing, reduce=reduce) for z in logits)
        rule = next((rule for rule in rules if rule is not None), None)
        if rule is None:
            raise UnknownRouter("its weights follow no rule that is known")
        data = objective.data(variant.routing, objective.sampled)
        rows = refit_router(rows, candidate.segments, *data, rule, variant.ridge, bias=bias, reduce=reduce)
        candidate = replace(candidate, router_rows=rows)
        moved = replace(variant, candidate=candidate, routing=objective.measured.reroute(candidate))
        moved = DownRefit()(moved, objective)
        return moved.after("router", segments=moved.candidate.segments)

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [refit_router_cost(shape), refit_down_cost(shape, sweeps=1)]


@dataclass(frozen=True)
class NeuronRefit:
    """Step that refits gate, up and down projections together by minibatch gradient descent.

    With held-out tokens, it ends with the first pass that lowers their error by less than `WORTH_A_PASS`.
    """

    seed: int = 0
    sampled = False

    def __call__(self, variant: Variant, objective: Objective) -> Variant:
        order = objective.measured.order[objective.fitted.to(objective.measured.order.device)]
        data = objective.data(variant.routing, objective.fitted)
        passes = count_passes(objective.measured.statistics.tokens) if objective.judges else UNJUDGED_PASSES
        error = objective.error(variant).total if objective.judges else 0.0
        descent = descend_neurons(
            variant.candidate.segments, *data, order=order, reduce=objective.reduce, seed=self.seed
        )
        for number, segments in enumerate(descent, start=1):
            made = replace(variant.after("neurons", segments=segments), anchor=segments)
            if objective.judges:
                error, before = objective.error(made).total, error
            if number == passes or (objective.judges and error > (1 - WORTH_A_PASS) * before):
                return made

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [descend_neurons_cost(shape)]


def first_refit(config: DernConfig) -> DownRefit:
    """Return the refit that every candidate gets; one sweep suffices where a guarded neuron refit follows."""
    return DownRefit(1 if config.guard and config.neuron_refit else config.refit_sweeps)


def sampled_tokens(config: DernConfig, neurons: int, top_k: int, tokens: int) -> int:
    """Return how many tokens closed-form refits use: all of them, or only enough where the neuron refit follows.

    Args:
        config: of the compression.
        neurons: number of neurons of all retained experts together.
        top_k: experts per token.
        tokens: number of calibration tokens.
    """
    return min(tokens, enough_tokens(neurons, top_k)) if config.neuron_refit else tokens


def further_steps(config: DernConfig) -> Iterator[Step]:
    """Yield the steps that follow the first refit of a candidate, in order; none where the config disables refits."""
    if not config.refit:
        return
    if config.guard and not config.neuron_refit and config.refit_ridge is None:
        yield from map(OtherRidge, RIDGES)
    if config.router_refit:
        yield RouterRefit()
    if config.neuron_refit:
        yield NeuronRefit(config.seed)
