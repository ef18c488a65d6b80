"""The phases of compressing one MoE layer, with the memory and the operations that each of them takes.

Every step declares its own cost (`core.layer.cost`); this module adds what stays in memory between the steps: the
layer's inputs and outputs on the calibration tokens, the candidates, and their refitted weights.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ...condensing.dense_network import dense_width
from ...config import DernConfig
from ...core.criteria.registry import CRITERIA
from ...core.layer.cost import Cost, LayerShape, experts_operations, held_by_chunk
from ...core.layer.statistics import measure_experts_cost
from ...core.layer.workspace import MAX_ELEMENTS
from ...core.merging.condense import condense_experts_cost
from ...core.neurons.sensitivity import sensitivity_cost
from ...core.neurons.statistics import measure_neurons_cost
from ...core.pictures.similarity_map import similarity_map_cost
from ...core.refits.down_projections import refit_down_cost
from ...data.batches import TOKENS
from ...methods import get_method
from ...models.moe.structure import MoELayer
from ..layer.importance import gradient_needed
from ..layer.narrowing import written_width
from ..layer.needs import why_tokens
from ..layer.steps import first_steps, further_steps, sampled_tokens


__all__ = ["Phase", "layer_phases", "layer_shape", "pass_tokens", "result_shape"]


class Phase(NamedTuple):
    """Memory in use beside the original layer during one phase, and the operations of the phase."""

    name: str
    tokens: int  # bytes of the layer's inputs and outputs on the calibration tokens, and of one expert at a time
    experts: int  # bytes of copies of all retained experts, less those of the original experts once they are freed
    operations: float  # floating-point operations


def layer_shape(
    layer: MoELayer, tokens: int, num_experts: int, max_elements: int = MAX_ELEMENTS, width: int | None = None
) -> LayerShape:
    """Read the sizes of a layer, whose weights need not be loaded.

    Args:
        layer: with its original experts.
        tokens: calibration tokens of this process.
        num_experts: N, experts that the layer keeps.
        max_elements: elements that a step's temporary tensors may have.
        width: neurons of a retained expert; by default all.
    """
    down, layout = layer.experts.down_proj, layer.layout
    size = down.shape[2 if layout.transposed else 1]
    first = layer.experts.gate_up_proj if layout.gated else layer.experts.up_proj
    inputs = first.shape[1] if layout.transposed else first.shape[2]
    return LayerShape(
        tokens=tokens,
        experts=layer.num_experts,
        retained=num_experts,
        top_k=layer.top_k,
        width=layer.width,
        inputs=inputs + layout.biased,
        outputs=size,
        projections=2 + layout.gated,
        itemsize=down.element_size(),
        max_elements=max_elements,
        kept_width=width if width != layer.width else None,
        biased=layout.biased,
    )


def result_shape(
    layer: MoELayer, tokens: int, config: DernConfig, num_experts: int, max_elements: int = MAX_ELEMENTS
) -> LayerShape:
    """Read the sizes of a layer and of what a config makes of it; a dense layer is one wide expert.

    Args:
        layer: with its original experts.
        tokens: calibration tokens of this process.
        config: of the compression.
        num_experts: N, experts that the layer keeps where it keeps its router.
        max_elements: elements that a step's temporary tensors may have.
    """
    if config.condensed_layers is None:
        return layer_shape(layer, tokens, num_experts, max_elements, written_width(layer, config))
    chosen = layer.top_k if config.num_experts is None else config.num_experts
    return layer_shape(layer, tokens, 1, max_elements, dense_width(layer, chosen))


def layer_phases(shape: LayerShape, config: DernConfig, shared: bool = False) -> list[Phase]:
    """List the phases of compressing one layer, in the order in which they run.

    Args:
        shape: sizes of the layer.
        config: of the compression.
        shared: the original experts stay in memory, since other results of the same pass need them.
    """
    standing = Standing(shape, config)
    if config.condensed_layers is not None:
        return list(_condensing_phases(standing))
    return [*_original_phases(standing), *_fitting_phases(standing, 0 if shared else standing.original)]


class Standing:
    """What stays in memory between the steps of a layer, in bytes, and what these sizes follow from.

    Args:
        shape: sizes of the layer.
        config: of the compression.
    """

    def __init__(self, shape: LayerShape, config: DernConfig) -> None:
        self.shape, self.config, self.method = shape, config, get_method(config.method)
        self.choices = shape.tokens * shape.top_k * (8 + shape.itemsize)  # experts and gate weights of every token
        self.routed = self.choices + 8 * shape.tokens * shape.top_k  # of a variant, with the slots of each expert
        self.output = shape.number * shape.tokens * shape.outputs
        residual = CRITERIA[config.selection].needs == "residual"
        received = shape.itemsize * shape.tokens * (shape.inputs + shape.outputs * residual)
        self.tokens = self.choices + self.output + received if why_tokens(config) is not None else 0
        self.error = shape.itemsize * shape.tokens * shape.outputs if config.corrects_drift else 0  # once measured
        self.passed = shape._replace(tokens=pass_tokens(shape.tokens, config))  # of a micro-batch
        self.forward = self.passed.tokens * (2 * shape.itemsize + shape.number) * shape.outputs
        self.original = shape.experts * shape.expert * shape.itemsize
        self.candidate = shape.retained * shape.narrower.expert * shape.itemsize
        self.refitted = shape.retained * shape.narrower.down * shape.number  # down projections of a fit
        self.candidates, self.sets = self.method.candidates(config) if config.guard else (1, 1)


def _measured(standing: Standing) -> Phase:
    """Return the phase in which the original layer is run and measured."""
    run = standing.forward + measure_experts_cost(standing.passed).held
    return Phase("measure", standing.tokens + run, 0, measure_experts_cost(standing.shape).operations)


def _condensing_phases(standing: Standing) -> Iterator[Phase]:
    """Yield the phases of making a layer dense; the original one stays in memory."""
    shape, config = standing.shape, standing.config
    yield _measured(standing)
    dense = shape.fitted(shape.tokens)._replace(top_k=1)
    chosen = condense_experts_cost(shape._replace(retained=dense.width // shape.width))
    outputs, weights = 2 * standing.output, shape.number * dense.expert  # beside the routed experts, and of the block
    yield Phase("condense", standing.tokens + outputs + chosen.held, 0, chosen.operations)
    judged = experts_operations(dense) * (1 + bool(config.refit)) * bool(config.guard) / 10
    run = outputs + shape.number * shape.tokens * (shape.inputs + shape.outputs)
    run += 2 * weights  # the joined neurons are in memory, also where experts are in files
    yield Phase("join", standing.tokens + run + held_by_chunk(dense), 0, judged)
    if config.refit:
        cost = refit_down_cost(dense, sweeps=1)
        yield Phase("refit", standing.tokens + run + cost.held, cost.experts, cost.operations)


def _original_phases(standing: Standing) -> Iterator[Phase]:
    """Yield the phases that run while the original experts are in memory."""
    shape, config = standing.shape, standing.config
    yield _measured(standing)
    if (loss := gradient_needed(config)) is not None:
        yield _backward(standing, loss)
    if config.corrects_drift:
        compared = 12 * standing.passed.tokens * shape.outputs
        yield Phase("drift", standing.tokens + standing.error + compared, 0, 0.0)
    tokens = standing.tokens + standing.error
    likeness = similarity_map_cost(shape)
    yield Phase("map", tokens + likeness.held, 0, likeness.operations)
    criterion = CRITERIA[config.selection].cost(shape)
    yield Phase("select", tokens + criterion.held, 0, criterion.operations)
    if config.importance is not None:
        neurons = measure_neurons_cost(shape)
        yield Phase("importance", tokens + neurons.held, 0, neurons.operations)
    for cost in standing.method.costs(shape, config):
        yield Phase("propose", tokens + cost.held, cost.experts, cost.operations)
    proposed = standing.method.candidates(config)[0] * standing.candidate
    whole = shape.retained * shape.expert * shape.itemsize if config.narrows else 0  # a candidate of all neurons
    yield Phase("proposed", tokens, proposed + whole, 0.0)


def _backward(standing: Standing, loss: str) -> Phase:
    """Return the phase in which the gradient passes through the layer, one micro-batch at a time."""
    passed = standing.passed
    slot = 2 * (passed.projections + 1) * passed.width + passed.inputs + 2 * passed.outputs  # its own experts
    held = passed.number * passed.tokens * (passed.top_k * slot + 8 * passed.inputs)
    cost = measure_neurons_cost(passed)
    weights = sensitivity_cost(passed).experts if loss == "teacher" else 0
    return Phase("backward", held + cost.held, weights, 3 * measure_neurons_cost(standing.shape).operations)


def _fitting_phases(standing: Standing, gone: int) -> Iterator[Phase]:
    """Yield the phases that run after the original experts have been freed; `gone` is the number of bytes freed."""
    shape, config, sets, measured = standing.shape, standing.config, standing.sets, standing.tokens + standing.error
    kept, judged = standing.candidates * standing.candidate - gone, _judged(standing)
    operations = standing.candidates * judged.operations
    yield Phase("judge", measured + sets * standing.routed + judged.held, kept, operations)
    if config.refit:
        sample = shape.fitted(sampled_tokens(config, shape.retained * shape.narrower.width, shape.top_k, shape.tokens))
        seen = sample.tokens * (shape.itemsize * shape.inputs + shape.number * shape.outputs)  # by a fit
        tokens = measured + seen
        for step in first_steps(config):
            for cost in step.costs(sample):
                held = tokens + sets * standing.routed + cost.held
                beside = kept + standing.refitted  # the best so far
                operations = standing.candidates * (cost.operations + judged.operations)
                yield Phase(type(step).__name__, held, beside + cost.experts, operations)
        finalist = standing.candidate + standing.refitted - gone
        for step in further_steps(config):
            for cost in step.costs(sample if step.sampled else shape.fitted(shape.tokens)):
                held = tokens + 2 * standing.routed + cost.held
                yield Phase(type(step).__name__, held, finalist + cost.experts, cost.operations + judged.operations)
    written = 2 * standing.candidate + standing.refitted * bool(config.refit) - gone
    yield Phase("write", measured + standing.choices, written, 0.0)
    if config.calibration_order == "sequential":
        run = standing.forward + held_by_chunk(standing.passed)
        yield Phase("run", measured + run, standing.candidate - gone, 0.0)


def pass_tokens(tokens: int, config: DernConfig) -> int:
    """Return how many of some calibration tokens go through a layer at once, at most."""
    most = TOKENS if config.batch_size is None else config.batch_size * config.sequence_length
    return min(tokens, max(most, config.sequence_length))


def _judged(standing: Standing) -> Cost:
    """Cost of the guard's evaluation of one variant on a tenth of the tokens; zero without the guard."""
    shape = standing.shape.narrower
    if not standing.config.guard:
        return Cost()
    return Cost(standing.output + held_by_chunk(shape), 0, experts_operations(shape) / 10)
