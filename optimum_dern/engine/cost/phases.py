"""The phases of compressing one MoE layer, with what is in memory during each of them and what it computes.

Every step says itself what it costs (`core.layer.cost`); here is only what stays between the steps: the calibration
tokens as the layer sees them, the candidates, and their fits.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ...config import DernConfig
from ...core.criteria.registry import CRITERIA
from ...core.layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ...core.layer.statistics import measure_experts_cost
from ...core.layer.workspace import MAX_ELEMENTS
from ...core.pictures.similarity_map import similarity_map_cost
from ...methods import get_method
from ...models.moe.structure import MoELayer
from ..layer.steps import Scale, first_refit, further_steps, sampled_tokens


__all__ = ["Phase", "layer_phases", "layer_shape"]


class Phase(NamedTuple):
    """What is beside the original layer at one time."""

    name: str
    tokens: int  # bytes of what the calibration tokens show, and of one expert at a time
    experts: int  # bytes of copies of all retained experts; negative where the original ones are gone
    operations: float  # of floating-point numbers


def layer_shape(layer: MoELayer, tokens: int, num_experts: int, max_elements: int = MAX_ELEMENTS) -> LayerShape:
    """The sizes of a layer; its weights need not be there.

    Args:
        layer: with its original experts.
        tokens: calibration tokens of this process.
        num_experts: N.
        max_elements: numbers that a step may hold at once.
    """
    down, layout = layer.experts.down_proj, layer.layout
    width, size = (down.shape[1], down.shape[2]) if layout.transposed else (down.shape[2], down.shape[1])
    first = layer.experts.gate_up_proj if layout.gated else layer.experts.up_proj
    inputs = first.shape[1] if layout.transposed else first.shape[2]
    return LayerShape(
        tokens=tokens,
        experts=layer.num_experts,
        retained=num_experts,
        top_k=layer.top_k,
        width=width,
        inputs=inputs + layout.biased,
        outputs=size,
        projections=2 + layout.gated,
        itemsize=down.element_size(),
        max_elements=max_elements,
    )


def layer_phases(shape: LayerShape, config: DernConfig, shared: bool = False) -> list[Phase]:
    """The phases of one layer, in turn.

    Args:
        shape: of the layer.
        config: what is done to it.
        shared: other results need the original experts afterwards.
    """
    standing = Standing(shape, config)
    return [*_original_phases(standing), *_fitting_phases(standing, 0 if shared else standing.original)]


class Standing:
    """Bytes of what stays in memory from step to step.

    Args:
        shape: of the layer.
        config: what is done to it.
    """

    def __init__(self, shape: LayerShape, config: DernConfig) -> None:
        self.shape, self.config, self.method = shape, config, get_method(config.method)
        self.received = shape.tokens * (shape.itemsize * shape.inputs + shape.top_k * (8 + shape.itemsize))  # routing
        self.output = shape.number * shape.tokens * shape.outputs
        residual = CRITERIA[config.selection].needs == "residual"
        self.tokens = 2 * self.received + self.output + shape.itemsize * shape.tokens * shape.outputs * residual
        self.original = shape.experts * shape.expert * shape.itemsize
        self.candidate = shape.retained * shape.expert * shape.itemsize
        self.refitted = shape.retained * shape.down * shape.number  # down projections of a fit
        self.candidates, self.sets = self.method.candidates(config) if config.guard else (1, 1)


def _original_phases(standing: Standing) -> Iterator[Phase]:
    """As long as the original experts are there."""
    shape, config = standing.shape, standing.config
    measured = measure_experts_cost(shape)
    yield Phase("measure", standing.tokens + max(standing.received, measured.held), 0, measured.operations)
    if config.corrects_drift:
        yield Phase("drift", standing.tokens + 3 * standing.output, 0, 0.0)
        standing.tokens += standing.output
    criterion = CRITERIA[config.selection].cost(shape)
    yield Phase("select", standing.tokens + criterion.held, 0, criterion.operations)
    for cost in standing.method.costs(shape, config):
        yield Phase("propose", standing.tokens + cost.held, cost.experts, cost.operations)
    proposed = standing.method.candidates(config)[0] * standing.candidate
    likeness = similarity_map_cost(shape)
    yield Phase("map", standing.tokens + likeness.held, proposed, likeness.operations)


def _fitting_phases(standing: Standing, gone: int) -> Iterator[Phase]:
    """From the moment when the original experts are gone, if nobody else needs them."""
    shape, config, sets, tokens = standing.shape, standing.config, standing.sets, standing.tokens
    kept, judged = standing.candidates * standing.candidate - gone, _judged(standing)
    operations = standing.candidates * judged.operations
    yield Phase("judge", tokens + sets * standing.received + judged.held, kept, operations)
    if config.refit:
        sample = shape.fitted(sampled_tokens(config, shape.retained * shape.width, shape.top_k, shape.tokens))
        tokens += sample.tokens * (shape.itemsize * shape.inputs + shape.number * shape.outputs)  # what a fit sees
        scaled = Scale().costs(sample) if config.guard else []
        for cost in [*scaled, *first_refit(config).costs(sample)]:
            beside = kept + (sets - 1) * standing.refitted + sum(other.experts for other in scaled)
            operations = standing.candidates * (cost.operations + judged.operations)
            yield Phase("refit", tokens + sets * standing.received + cost.held, beside + cost.experts, operations)
        finalists = sets * (standing.candidate + standing.refitted) - gone
        for step in further_steps(config):
            for cost in step.costs(sample if step.sampled else shape.fitted(shape.tokens)):
                held = tokens + (sets + 1) * standing.received + cost.held
                operations = sets * (cost.operations + judged.operations)
                yield Phase(type(step).__name__, held, finalists + cost.experts, operations)
    written = 2 * standing.candidate + standing.refitted * bool(config.refit) - gone
    yield Phase("write", standing.tokens + standing.received, written, 0.0)


def _judged(standing: Standing) -> Cost:
    """What judging one variant takes, on a tenth of the tokens; nothing where there is no guard."""
    shape = standing.shape
    if not standing.config.guard:
        return Cost()
    return Cost(standing.output + held_by_chunk(shape), 0, experts_operations(shape) / 10)
