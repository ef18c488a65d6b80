"""Prediction of the peak memory of a compression from tensor shapes, and a plan that keeps it below `max_memory`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...config import DernConfig
from ...core.layer.workspace import MAX_ELEMENTS
from ...models.moe.structure import MoELayer, find_decoder_layers
from ..layer.importance import gradient_needed
from ..layer.narrowing import ranks_all_layers
from .condensing import SearchMemory, network_bytes, plan_of, search_memory
from .phases import layer_phases, pass_tokens, result_shape


__all__ = ["INTERPRETER", "MemoryPlan", "plan_memory"]

INTERPRETER = 600 << 20  # Python, torch, transformers and datasets, without any weight
MAPPED = 160 << 20  # pages of files that a run has mapped at once
# Bytes a neuron: its statistics; its index among those that stay; scores, indices and masks while all are ranked.
MEASURED, KEPT, RANKED = 6 * 8, 8, 5 * 8
SMALLEST = MAX_ELEMENTS >> 4  # smaller blocks save little and take long


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory of a run in bytes, and what the run keeps in files to stay below it."""

    interpreter: int
    outside: int  # modules outside the decoder layers, such as embeddings
    layer: int  # the largest decoder layer
    working: int  # beside it: candidates, refits, and the layer's inputs and outputs on the calibration tokens
    hidden: int  # hidden states of all calibration tokens
    scratch: int = 0  # largest size of the files that hold experts, or the networks of dense layers
    spilled: bool = False  # the hidden states are in a file
    experts_in_file: bool = False  # a layer's weights and the candidates' experts are in files, too
    max_elements: int = MAX_ELEMENTS  # elements of a step's largest temporary tensors

    @property
    def mapped(self) -> int:
        """Bytes of memory-mapped files that may be resident at once, and count as used memory."""
        return MAPPED if self.experts_in_file else 0

    @property
    def peak(self) -> int:
        """Predicted peak memory in bytes."""
        most = self.working if self.experts_in_file else max(self.outside, self.layer + self.working)
        return self.interpreter + self.mapped + most + (0 if self.spilled else self.hidden)

    @property
    def disk(self) -> int:
        """Bytes of disk space for working files, which are removed after the run."""
        return self.scratch + (self.hidden if self.spilled else 0)


def plan_memory(
    model: Any,
    layers: Sequence[MoELayer],
    tokens: int,
    config: DernConfig,
    num_experts: int | Sequence[int],
    max_memory: int | None = None,
    device: torch.device | str = "cpu",
) -> MemoryPlan:
    """Predict the peak memory, and plan to keep hidden states, then experts too, in files where a bound demands it.

    Args:
        model: its weights need not be loaded.
        layers: its MoE layers.
        tokens: number of calibration tokens.
        config: of the compression.
        num_experts: N, or the N of every result where one pass makes several.
        max_memory: bound in bytes, or None for no bound.
        device: where layers are computed; their experts can be in files on the CPU only.

    Raises:
        ValueError: the bound is too low; the message tells the lowest possible one.
    """
    counts = [num_experts] if isinstance(num_experts, int) else num_experts
    on_cpu = torch.device(device).type == "cpu"
    plans = [plan for plan in _plans(model, layers, tokens, config, counts) if on_cpu or not plan.experts_in_file]
    for plan in plans:
        if max_memory is None or plan.peak <= max_memory:
            return plan
    least = min(plans, key=lambda plan: plan.peak)
    raise ValueError(
        f"max_memory is {_gib(max_memory)}, but this compression needs at least {_gib(least.peak)}, hidden states and "
        f"experts in files where that helps: {_gib(least.interpreter)} for Python and torch and {_gib(least.working)} "
        "for the work on a layer; allow more, give less calibration data or batch_size=1, or leave steps out "
        "(neuron_refit takes most)" + ("" if on_cpu else f"; experts in files need device='cpu', not {str(device)!r}")
    )


def _plans(
    model: Any, layers: Sequence[MoELayer], tokens: int, config: DernConfig, counts: Sequence[int]
) -> Iterator[MemoryPlan]:
    """Yield the possible plans, from the fastest to the one that takes least memory."""
    _, decoder_layers = find_decoder_layers(model, layers[0])
    largest = max(_bytes(layer) for layer in decoder_layers)
    outside = _bytes(model) - sum(_bytes(layer) for layer in decoder_layers)
    streams = len(counts) if config.calibration_order == "sequential" else 1  # each result has a stream of its own
    streams += config.corrects_drift  # and that of the original model
    if gradient_needed(config):  # before all else: what enters every layer, and a gradient
        streams = max(streams, len(decoder_layers) + 2)
    hidden = streams * tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize
    (neurons, ranking), attention = _neurons(layers, config, counts), _attention(model, pass_tokens(tokens, config))
    least = max(attention, ranking)
    condensing = plan_of(model, layers, config)
    search = search_memory(model, condensing, tokens, config) if condensing and condensing.searched else None

    def plan(spilled: bool, in_file: bool, max_elements: int = MAX_ELEMENTS) -> MemoryPlan:
        shapes = [result_shape(layer, tokens, config, count, max_elements) for layer in layers for count in counts]
        phases = [phase for shape in dict.fromkeys(shapes) for phase in layer_phases(shape, config, len(counts) > 1)]
        made = MemoryPlan(
            interpreter=INTERPRETER,
            outside=outside,
            layer=largest,
            working=neurons + max(least, *(phase.tokens + (0 if in_file else phase.experts) for phase in phases)),
            hidden=hidden,
            scratch=(sum(network_bytes(condensing)) if condensing else 0)
            + (largest + max(p.experts for p in phases) if in_file else 0),
            spilled=spilled,
            experts_in_file=in_file,
            max_elements=max_elements,
        )
        return made if search is None else _with_search(made, search, attention)

    yield plan(spilled=False, in_file=False)
    yield plan(spilled=True, in_file=False)
    max_elements = MAX_ELEMENTS
    while max_elements >= SMALLEST:
        yield plan(True, True, max_elements)
        max_elements //= 2


def _with_search(plan: MemoryPlan, search: SearchMemory, attention: int) -> MemoryPlan:
    """Return the plan of whichever takes more memory, the work on the layers or the search among them after it."""
    working = search.network + max(search.forward, attention) + (search.kept if plan.spilled else 0)
    searching = replace(plan, working=working, hidden=search.hidden)
    most = max(plan, searching, key=lambda stage: stage.peak)
    return replace(most, hidden=max(plan.hidden, search.hidden)) if plan.spilled else most


def _attention(model: Any, tokens: int) -> int:
    """Return the bytes of a micro-batch before attention: normed, queries being rotated, keys, values."""
    config = model.config.get_text_config()
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None) or 0
    size = max(size, *(getattr(config, name, None) or 0 for name in ("qk_head_dim", "v_head_dim")))
    queries = heads * size if size else config.hidden_size
    pairs = queries * (getattr(config, "num_key_value_heads", None) or heads) // heads
    return model.dtype.itemsize * tokens * (config.hidden_size + 4 * queries + 2 * pairs)


def _neurons(layers: Sequence[MoELayer], config: DernConfig, counts: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of what a run knows of the neurons of all layers, and of ranking them before the first one."""
    if gradient_needed(config) is None:
        return 0, 0
    neurons = sum(layer.num_experts * layer.width for layer in layers)
    if not any(ranks_all_layers(layers[0], config, count) for count in counts):
        return MEASURED * neurons, 0
    return (MEASURED + KEPT) * neurons, RANKED * neurons


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
