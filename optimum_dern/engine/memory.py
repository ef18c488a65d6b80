"""What a layer-by-layer compression holds at once, predicted from shapes alone, and what keeps it within a bound."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config import DernConfig
from ..core.criteria import CRITERIA
from ..core.greedy import trial_tokens
from ..core.mixture import CHUNK_TOKENS
from ..core.neuron_refit import BATCH_TOKENS
from ..core.workspace import MAX_ELEMENTS
from ..methods.dern import tries_second_set
from ..models.structure import MoELayer, find_decoder_layers


__all__ = ["MemoryPlan", "plan_memory"]

INTERPRETER = 600 << 20  # Python, torch, transformers and datasets, without any weight
MAPPED = 160 << 20  # pages of files that a run has mapped at once
SMALLEST = MAX_ELEMENTS >> 4  # smaller blocks save little and take long
FLOAT = 4  # bytes: the refits compute in float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the moment when most is needed, and how a run gets by with them."""

    interpreter: int
    outside: int  # what surrounds the decoder layers, such as embeddings
    layer: int  # the largest decoder layer
    working: int  # beside it: candidates, refits, and what the calibration tokens show of the layer
    hidden: int  # hidden states of all calibration tokens
    scratch: int = 0  # most bytes of files of experts
    spilled: bool = False  # the hidden states are in a file
    experts_in_file: bool = False  # and so are a layer's weights, and what is made from its experts
    max_elements: int = MAX_ELEMENTS  # numbers that a step holds of each other kind

    @property
    def mapped(self) -> int:
        """Bytes of files that may be in memory at once, and count as used."""
        return MAPPED if self.experts_in_file else 0

    @property
    def peak(self) -> int:
        """Bytes of memory."""
        most = self.working if self.experts_in_file else max(self.outside, self.layer + self.working)
        return self.interpreter + self.mapped + most + (0 if self.spilled else self.hidden)

    @property
    def disk(self) -> int:
        """Bytes of working files."""
        return self.scratch + (self.hidden if self.spilled else 0)


def plan_memory(
    model: Any,
    layers: Sequence[MoELayer],
    tokens: int,
    config: DernConfig,
    num_experts: int | Sequence[int],
    max_memory: int | None = None,
) -> MemoryPlan:
    """Predict the peak, and put into files what has to be there to keep a bound: hidden states, then experts too.

    Args:
        model: its weights need not be there.
        layers: its MoE layers.
        tokens: of the calibration data.
        config: what is done to a layer.
        num_experts: N, or that of each result where one pass gives several.
        max_memory: bytes, or None for no bound.

    Raises:
        ValueError: a bound that cannot be kept; the message tells the least that can.
    """
    counts = [num_experts] if isinstance(num_experts, int) else num_experts
    plans = list(_plans(model, layers, tokens, config, counts))
    for plan in plans:
        if max_memory is None or plan.peak <= max_memory:
            return plan
    least = min(plans, key=lambda plan: plan.peak)
    raise ValueError(
        f"max_memory is {_gib(max_memory)}, but this compression needs at least {_gib(least.peak)}, hidden states and "
        f"experts in files where that helps: {_gib(least.interpreter)} for Python and torch and {_gib(least.working)} "
        "for the work on a layer; allow more, give less calibration data, or leave steps out (neuron_refit takes most)"
    )


def _plans(
    model: Any, layers: Sequence[MoELayer], tokens: int, config: DernConfig, counts: Sequence[int]
) -> Iterator[MemoryPlan]:
    """From the fastest to the one that takes least memory."""
    _, decoder_layers = find_decoder_layers(model, layers[0])
    largest = max(_bytes(layer) for layer in decoder_layers)
    outside = _bytes(model) - sum(_bytes(layer) for layer in decoder_layers)
    streams = len(counts) if config.calibration_order == "sequential" else 1  # each result sees its own layers
    streams += config.corrects_drift  # and the original's
    hidden = streams * tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize

    def plan(spilled: bool, in_file: bool, max_elements: int = MAX_ELEMENTS) -> MemoryPlan:
        block, several = max_elements * FLOAT, len(counts) > 1
        phases = [p for layer in layers for n in counts for p in _phases(layer, tokens, config, n, several, block)]
        most_of_experts = max(phase.experts for phase in phases)
        return MemoryPlan(
            interpreter=INTERPRETER,
            outside=outside,
            layer=largest,
            working=max(phase.rest + (0 if in_file else phase.experts) for phase in phases),
            hidden=hidden,
            scratch=largest + most_of_experts if in_file else 0,
            spilled=spilled,
            experts_in_file=in_file,
            max_elements=max_elements,
        )

    yield plan(spilled=False, in_file=False)
    yield plan(spilled=True, in_file=False)
    max_elements = MAX_ELEMENTS
    while max_elements >= SMALLEST:
        yield plan(True, True, max_elements)
        max_elements //= 2


class _Phase(NamedTuple):
    """Bytes beside the original layer at one time."""

    rest: int  # of tokens, and of one expert at a time
    experts: int  # copies of all retained experts; negative where the original is gone


def _phases(
    layer: MoELayer, tokens: int, config: DernConfig, count: int, shared: bool, block: int
) -> Iterator[_Phase]:
    """The phases of compressing one layer; the last ones go without the original, unless it is shared."""
    down = layer.experts.down_proj
    width, size = (down.shape[1], down.shape[2]) if layer.layout.transposed else (down.shape[2], down.shape[1])
    experts, dtype = sum(_size(p) for p in layer.experts.parameters(recurse=False)), down.element_size()
    one = experts // layer.num_experts * FLOAT // dtype  # in float32
    inputs, outputs = tokens * size * dtype, tokens * size * FLOAT
    chunk = min(CHUNK_TOKENS, tokens) * (4 * width + 3 * size) * FLOAT
    held, copies = 2 * inputs + outputs, (2 if config.method == "dern" else 1)  # block inputs, experts' inputs, target
    held += inputs if CRITERIA[config.selection].needs == "residual" else 0
    held += config.corrects_drift * outputs  # what refits aim at
    yield _Phase(held + 2 * inputs + config.corrects_drift * 2 * outputs + one + chunk, 0)
    if config.selection == "greedy" or tries_second_set(config):
        tried = min(tokens, trial_tokens(layer.num_experts)) * layer.num_experts
        grams = tried * layer.num_experts * 2 * FLOAT  # float64
        yield _Phase(held + one + chunk + grams + 2 * min(block, tried * size * FLOAT), 0)

    kept = experts * count // layer.num_experts
    pool = one * layer.num_experts // count  # an expert and what it receives, on average
    similarities = min(block, width * width * layer.num_experts // count * FLOAT)
    proposing = 3 * pool + similarities if config.method == "dern" else 0
    yield _Phase(held + one + proposing, kept * copies)

    gone = 0 if shared else experts
    in_float = kept * FLOAT // dtype
    down_in_float = in_float * _size(down) // experts
    rerouted = (copies + 1) * inputs
    chosen = kept * copies + 2 * down_in_float  # candidates, the best refit so far, and the one that is made
    if config.refit:
        fitted = inputs + 3 * outputs  # what a fit sees of inputs and targets, residuals, changes of these
        neurons = min(block, tokens * layer.top_k * width * FLOAT) + chunk
        factors = min(block, count * width**2 * FLOAT) + 2 * width**2 * FLOAT
        yield _Phase(held + rerouted + fitted + one + neurons + factors, chosen + down_in_float - gone)
        if config.neuron_refit:  # moving weights, and two running means of their gradients
            batch = min(BATCH_TOKENS, tokens) * layer.top_k * (6 * width + 2 * size) * FLOAT
            yield _Phase(held + rerouted + inputs + outputs + 3 * one + batch, chosen + 3 * in_float - gone)
            chosen += in_float
    yield _Phase(held + rerouted + one, chosen + kept - gone)


def _bytes(module: nn.Module) -> int:
    return sum(_size(p) for p in module.parameters())


def _size(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
