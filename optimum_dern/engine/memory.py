"""What a layer-by-layer compression holds at once, predicted from shapes alone, and whether a bound can be kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import DernConfig
from ..models.structure import MoELayer, find_decoder_layers


__all__ = ["MemoryPlan", "plan_memory"]

INTERPRETER = 600 << 20  # Python, torch, transformers and datasets, without any weight
BLOCK = 256 << 20  # what `core` keeps at most of similarities, factors and neurons, each
FLOAT = 4  # bytes: the refits compute in float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the moment when most is needed."""

    interpreter: int
    layer: int  # the largest decoder layer
    working: int  # beside it: candidates, refits, and what the calibration tokens show of the layer
    hidden: int  # hidden states of all calibration tokens
    spilled: bool  # these are in a file instead

    @property
    def peak(self) -> int:
        """Bytes of memory."""
        return self.interpreter + self.layer + self.working + (0 if self.spilled else self.hidden)


def plan_memory(
    model: Any,
    layers: Sequence[MoELayer],
    tokens: int,
    config: DernConfig,
    num_experts: int,
    max_memory: int | None = None,
) -> MemoryPlan:
    """Predict the peak, and put the hidden states into a file where that is what keeps a bound.

    Args:
        model: its weights need not be there.
        layers: its MoE layers.
        tokens: of the calibration data.
        config: what is done to a layer.
        num_experts: N.
        max_memory: bytes, or None for no bound.

    Raises:
        ValueError: a bound that cannot be kept; the message tells the least that can.
    """
    _, decoder_layers = find_decoder_layers(model, layers[0])
    working = max(_working_bytes(layer, tokens, config, num_experts) for layer in layers)
    largest = max(_bytes(layer) for layer in decoder_layers)
    hidden = tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize
    plan = MemoryPlan(INTERPRETER, largest, working, hidden, spilled=False)
    if max_memory is None or plan.peak <= max_memory:
        return plan
    plan = MemoryPlan(INTERPRETER, largest, working, hidden, spilled=True)
    if plan.peak > max_memory:
        raise ValueError(
            f"max_memory is {_gib(max_memory)}, but this compression needs at least {_gib(plan.peak)}: the largest "
            f"decoder layer takes {_gib(largest)} and the work on it {_gib(working)}; allow more, give less "
            "calibration data, or leave steps out (neuron_refit takes most)"
        )
    return plan


def _working_bytes(layer: MoELayer, tokens: int, config: DernConfig, num_experts: int) -> int:
    """Beside the layer itself: the most of its three phases, during the last of which the original is gone."""
    parameters = list(layer.experts.parameters(recurse=False))
    experts = sum(p.numel() * p.element_size() for p in parameters)
    down = layer.experts.down_proj
    width, size = (down.shape[1], down.shape[2]) if layer.layout.transposed else (down.shape[2], down.shape[1])
    inputs = outputs = tokens * size
    seen = 2 * inputs * down.element_size() + outputs * FLOAT  # as recorded and joined; the target
    one_expert = 3 * experts // layer.num_experts * FLOAT // down.element_size()
    kept = experts * num_experts // layer.num_experts
    candidates = kept * (2 if config.method == "dern" else 1)
    pool = width * layer.num_experts // num_experts  # segments that one retained expert merges, on average
    similarities = min(3 * BLOCK, 3 * pool * width * FLOAT) + 3 * one_expert * pool // width
    proposing = seen + candidates + one_expert + (similarities if config.method == "dern" else 0)
    refitting = seen + candidates - experts
    if config.refit:
        kept_down = kept * down.numel() // sum(p.numel() for p in parameters) * FLOAT // down.element_size()
        neurons = min(BLOCK, tokens * layer.top_k * width * FLOAT)
        factors = min(BLOCK, num_experts * width**2 * FLOAT)
        refitting += 2 * kept_down + neurons + factors + 2 * outputs * FLOAT + inputs * down.element_size()
        if config.neuron_refit:
            rest = kept * FLOAT // down.element_size() - kept_down
            refitting += 5 * rest + min(
                BLOCK, 3 * neurons
            )  # the step, three vectors of conjugate gradients, the result
    return max(seen + one_expert, proposing, refitting)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
