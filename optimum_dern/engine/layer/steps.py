"""The steps that fit a candidate to the original layer's output, and the memory and operations that each takes.

A step is called with a variant and the objective, and makes one or several new variants, of which the guard takes the
best.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ...config import DernConfig
from ...core.layer.cost import Cost, LayerShape
from ...core.refits.down_projections import refit_down, refit_down_cost
from ...core.refits.neurons import count_passes, descend_neurons, descend_neurons_cost
from ...core.refits.output_bias import fit_output_biases, fit_output_biases_cost
from ...core.refits.output_scale import fit_scales, fit_scales_cost, scale_outputs
from ...core.refits.router import refit_router, refit_router_cost
from ...core.router.choice import UnknownRouter
from ...core.router.rule import possible_logits, recognise_rule
from ...data.labels import enough_tokens
from ...machine.precision import drawn_in_tf32, products_in_tf32
from .objective import Objective
from .variant import Variant


__all__ = [
    "RIDGE",
    "RIDGES",
    "BiasRefit",
    "DownRefit",
    "NeuronRefit",
    "RouterRefit",
    "Scale",
    "Step",
    "first_steps",
    "further_steps",
    "sampled_tokens",
]

RIDGE = 1e-2  # where the config sets none, and there is no guard to choose one
RIDGES = (1e-2, 1e-3, 1e-1)  # from which it chooses
WORTH_A_PASS = 0.005  # relative fall of the held-out error for which the neuron refit goes on
UNJUDGED_PASSES = 4  # of the neuron refit, where no token is held out


class Step(Protocol):
    """A step that fits a variant to the objective."""

    sampled: bool  # whether it uses only the tokens sampled for closed-form refits, or all tokens for fitting

    def __call__(self, variant: Variant, objective: Objective) -> Iterator[Variant]:
        """Yield the variant after the step; raises `UnknownRouter` where the router does not allow the step."""

    def costs(self, shape: LayerShape) -> list[Cost]:
        """List the costs of its parts, in order, without the memory of the candidates and the tokens."""


@dataclass(frozen=True)
class Scale:
    """Step that scales every expert's output by the factor that fits the target best (least squares)."""

    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Iterator[Variant]:
        data = objective.data(variant, "sampled")
        segments = variant.candidate.segments
        with products_in_tf32(objective.device):
            scales = fit_scales(segments, *data, objective.reduce)
        yield variant.after("scale", scale_outputs(segments, scales))

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [fit_scales_cost(shape)]


@dataclass(frozen=True)
class BiasRefit:
    """Step that refits the experts' output biases in closed form; it makes nothing where there are none."""

    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Iterator[Variant]:
        if variant.candidate.segments.output_bias is not None:
            data = objective.data(variant, "sampled")
            segments = fit_output_biases(variant.candidate.segments, *data, objective.reduce)
            yield variant.after("bias", segments)

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [fit_output_biases_cost(shape)] if shape.biased else []


@dataclass(frozen=True)
class DownRefit:
    """Step that refits the down projections in closed form, once with each ridge."""

    ridges: tuple[float, ...] = (RIDGE,)
    sweeps: int = 1
    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Iterator[Variant]:
        data = objective.data(variant, "sampled")
        refitted = refit_down(variant.candidate.segments, *data, self.ridges, self.sweeps, objective.reduce)
        for segments in drawn_in_tf32(refitted, objective.device):
            yield variant.after("refit", segments)

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [refit_down_cost(shape, self.sweeps, len(self.ridges))]


@dataclass(frozen=True)
class RouterRefit:
    """Step that refits the router's rows by a Gauss-Newton step, and then the down projections to the new routing.

    Its conjugate gradients are not computed in TF32, in which they have not been measured.
    """

    then: DownRefit = DownRefit()
    ridge: float = RIDGE
    sampled = True

    def __call__(self, variant: Variant, objective: Objective) -> Iterator[Variant]:
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
        data = objective.data(variant, "sampled")
        rows = refit_router(rows, candidate.segments, *data, rule, self.ridge, bias=bias, reduce=reduce)
        candidate = replace(candidate, router_rows=rows)
        moved = replace(variant, candidate=candidate, routing=objective.measured.reroute(candidate))
        moved = moved.after("router", candidate.segments)
        yield from self.then(moved, objective)

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [refit_router_cost(shape), *self.then.costs(shape)]


@dataclass(frozen=True)
class NeuronRefit:
    """Step that refits gate, up and down projections together by minibatch gradient descent.

    With held-out tokens, it ends with the first pass that lowers their error by less than `WORTH_A_PASS`.
    """

    seed: int = 0
    sampled = False

    def __call__(self, variant: Variant, objective: Objective) -> Iterator[Variant]:
        data = objective.data(variant, "fitted")
        passes = count_passes(objective.measured.statistics.tokens) if objective.judges else UNJUDGED_PASSES
        error = objective.error(variant) if objective.judges else None
        descent = descend_neurons(
            variant.candidate.segments,
            *data,
            order=objective.fitted_order,
            reduce=objective.reduce,
            seed=self.seed,
        )
        for number, segments in enumerate(drawn_in_tf32(descent, objective.device), start=1):
            made = variant.after("neurons", segments)
            if error is not None:
                error, before = objective.error(made), error
            if number == passes or (error is not None and error.total > (1 - WORTH_A_PASS) * before.total):
                yield replace(made, error=error)
                return

    def costs(self, shape: LayerShape) -> list[Cost]:
        return [descend_neurons_cost(shape)]


def first_steps(config: DernConfig) -> list[Step]:
    """Return the steps that every candidate takes before the best is chosen: cheap ones, where a long one follows."""
    return [Scale(), _down_refit(config)] if config.refit and config.neuron_refit else []


def _down_refit(config: DernConfig) -> DownRefit:
    tried = RIDGES if config.guard and not config.neuron_refit else (RIDGE,)  # a descent follows from any ridge's
    return DownRefit(tried if config.refit_ridge is None else (config.refit_ridge,), config.refit_sweeps)


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
    """Yield the steps that follow for the best candidate, in order; none where refits are disabled."""
    if config.refit and not first_steps(config):
        yield _down_refit(config)
    if config.refit:
        yield BiasRefit()
    if config.refit and config.router_refit:
        yield RouterRefit(_down_refit(config), config.refit_ridge or RIDGE)
    if config.refit and config.neuron_refit:
        yield NeuronRefit(config.seed)
