"""Compress a model layer by layer: record what a layer sees, compress it, go on with what it now gives.

    calls of every decoder layer  ->  per layer: load -> probe -> compress -> run -> write, free  ->  next layer

Where layers come from and go to is their provider's business: a model in memory, or a checkpoint on disk.

Sequential calibration (the default) lets later layers see the outputs of already compressed ones, so that they can
make up for them; with "oneshot" every layer sees the original model.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..calibration.recording import record_layer_calls, record_routing
from ..config import DernConfig
from ..core.mixture import Routing
from ..core.reduction import Reduce, any_process
from ..models.structure import MoELayer, find_decoder_layers, layers_by_position
from ..reporting.report import LayerReport
from .compression import compress_layer_
from .distributed import ALONE, Processes
from .progress import progress_bar
from .rewriting import LayerData
from .stream import HiddenStream


__all__ = ["LayerProvider", "LayersInMemory", "compress_layers_"]

HELD_OUT_EVERY = 10  # a tenth of the calibration sequences judges the candidates


class LayerProvider(Protocol):
    """Where decoder layers come from and go to."""

    finished: Mapping[int, LayerReport | None]  # layers that an earlier run has done

    def outside(self) -> AbstractContextManager:
        """What surrounds the decoder layers is in memory while the context is open."""

    def loaded(self, position: int, compressed: bool = False) -> AbstractContextManager:
        """The layer is in memory while the context is open; `compressed`, as an earlier run has left it."""

    def finish(self, position: int, report: LayerReport | None) -> None:
        """The layer, still in memory, is done; layers without experts have no report."""


class LayersInMemory:
    """Provides the layers of a model that is in memory as a whole."""

    def __init__(self) -> None:
        self.finished: dict[int, LayerReport | None] = {}

    def outside(self) -> AbstractContextManager:
        """Nothing to load."""
        return nullcontext()

    def loaded(self, position: int, compressed: bool = False) -> AbstractContextManager:
        """Nothing to load."""
        return nullcontext()

    def finish(self, position: int, report: LayerReport | None) -> None:
        """Nothing to write."""


def compress_layers_(
    model: nn.Module,
    layers: Sequence[MoELayer],
    batches: Sequence[dict],
    config: DernConfig,
    num_experts: int,
    provider: LayerProvider | None = None,
    spill: Path | None = None,
    processes: Processes = ALONE,
) -> list[LayerReport]:
    """Compress every MoE layer of a model, in place.

    Args:
        model: a causal language model in evaluation mode.
        layers: its MoE layers.
        batches: `input_ids` and `attention_mask` of the calibration sequences.
        config: what to do.
        num_experts: N, how many experts every layer keeps.
        provider: of the layers; by default the model has them in memory.
        spill: file for the hidden states; in memory by default.
        processes: that share the batches, all of which each is given.

    Returns:
        One report a layer.

    Raises:
        ValueError: a layer received no token, or hidden states that are not finite.
    """
    provider = provider or LayersInMemory()
    _, decoder_layers = find_decoder_layers(model, layers[0])
    positions = layers_by_position(model, layers)
    masks = [batch["attention_mask"].bool() for batch in batches]
    held_out = held_out_tokens(masks).split([int(mask.sum()) for mask in masks])  # of all batches, then of one's own
    batches, masks, held_out = processes.share(batches), processes.share(masks), torch.cat(processes.share(held_out))
    sequential = config.calibration_order == "sequential"
    with provider.outside():
        stream = HiddenStream(record_layer_calls(model, decoder_layers, batches), spill)
    reports = []
    for position in progress_bar(range(len(decoder_layers)), "Compressing layers"):
        decoder_layer, layer = decoder_layers[position], positions.get(position)
        done = position in provider.finished
        with provider.loaded(position, compressed=done and sequential):
            if done or layer is None:
                report = provider.finished.get(position)
                stream.step(position, decoder_layer)
            else:
                started = time.perf_counter()
                with record_routing(layer.block, layer.experts, stop=sequential) as record:
                    if sequential:
                        stream.probe(position, decoder_layer)
                    else:
                        stream.step(position, decoder_layer)
                routing = record.without_padding(masks)
                _check_routing(layer, routing, processes.reduce)
                data = LayerData(layer, routing, held_out, masks, record.block_calls)
                report = compress_layer_(data, config, num_experts, position, started, processes)
                if sequential:
                    stream.step(position, decoder_layer)
            if not done:
                provider.finish(position, report)
        reports += [report] if report is not None else []
    return reports


def held_out_tokens(masks: Sequence[Tensor]) -> Tensor:
    """Which real tokens belong to the held-out tenth of the sequences.

    Args:
        masks: per micro-batch, (batch, sequence) bool.

    Returns:
        (T,) bool over the real tokens of all micro-batches.  Of fewer than ten sequences the last is held out; of a
        single one, its last tenth.
    """
    lengths = torch.cat([mask.sum(1) for mask in masks]).tolist()
    if len(lengths) == 1:
        return torch.arange(lengths[0]) >= lengths[0] - max(1, lengths[0] // HELD_OUT_EVERY)
    count = len(lengths)
    last = [count - 1] if count < HELD_OUT_EVERY else range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY)
    chosen = set(last)
    return torch.cat([torch.full((length,), sequence in chosen) for sequence, length in enumerate(lengths)])


def _check_routing(layer: MoELayer, routing: Routing, reduce: Reduce) -> None:
    if not any_process(torch.tensor(len(routing.index) > 0, device=routing.index.device), reduce):
        raise ValueError(f"no calibration token reached {layer.name}; give more calibration text")
    if any_process(~torch.isfinite(routing.hidden).all(), reduce):
        raise ValueError(f"the inputs of {layer.name} contain NaN or infinity; try another dtype, such as bfloat16")
