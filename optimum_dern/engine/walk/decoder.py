"""Compress a model layer by layer: record what a layer sees, compress it, go on with what it now gives.

    calls of every decoder layer  ->  per layer: load -> probe -> compress -> run -> write, free  ->  next layer

Where layers come from is their provider's business: a model in memory, or a checkpoint on disk.  One pass may serve
several recipes: the original layer is loaded once, and each of them compresses it in its turn.

Sequential calibration (the default) lets later layers see the outputs of already compressed ones, so that they can
make up for them: every recipe then has hidden states of its own.  With "oneshot" every layer sees the original model,
whose hidden states and measurements all recipes share.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.layer.statistics import ExpertStatistics
from ...machine.processes import ALONE, Processes
from ...machine.progress import progress_bar
from ...machine.scratch import CopiesInFiles
from ...models.moe.structure import MoELayer, find_decoder_layers, layers_by_position
from ...results.report import LayerReport
from ..layer.measuring import unseen_layer
from .calls import record_layer_calls
from .recipe import Recipe, keep_originals
from .walks import LayerProvider, LayersInMemory, Pass, compress_for, open_walks, pass_layer


__all__ = ["compress_layers_", "compress_unseen_layers_", "held_out_tokens"]

HELD_OUT_EVERY = 10  # a tenth of the calibration sequences judges the candidates


def compress_layers_(
    model: nn.Module,
    layers: Sequence[MoELayer],
    batches: Sequence[dict],
    recipes: Sequence[Recipe],
    provider: LayerProvider | None = None,
    spill: Path | None = None,
    processes: Processes = ALONE,
    keep_statistics: Callable[[int, ExpertStatistics], None] | None = None,
) -> list[list[LayerReport]]:
    """Compress every MoE layer of a model: in place for a single recipe, else the model stays as it is.

    Args:
        model: a causal language model in evaluation mode.
        layers: its MoE layers.
        batches: `input_ids` and `attention_mask` of the calibration sequences.
        recipes: what to make of it; the sinks of several take the layers out of the model.
        provider: of the layers; by default the model has them in memory.
        spill: folder for files of hidden states; in memory by default.
        processes: that share the batches, all of which each is given.
        keep_statistics: gets those of every layer of the original model that is measured, with its position.

    Returns:
        For each recipe, one report a layer.

    Raises:
        ValueError: a layer received no token, or hidden states that are not finite.
    """
    provider = provider or LayersInMemory()
    _, decoder_layers = find_decoder_layers(model, layers[0])
    positions = layers_by_position(model, layers)
    masks = [batch["attention_mask"].bool() for batch in batches]
    held_out = held_out_tokens(masks).split([int(mask.sum()) for mask in masks])  # of all batches, then of one's own
    batches, masks, held_out = processes.share(batches), processes.share(masks), torch.cat(processes.share(held_out))
    common = Pass(masks, held_out, processes, keep_originals(recipes), keep_statistics)
    with provider.outside():
        keep = torch.detach if spill is None else CopiesInFiles(spill).copy
        walks = open_walks(record_layer_calls(model, decoder_layers, batches, keep), recipes, spill)
    for position in progress_bar(range(len(decoder_layers)), "Compressing layers"):
        pass_layer(position, decoder_layers[position], positions.get(position), walks, provider, common)
    return [recipe.reports for recipe in recipes]


def compress_unseen_layers_(
    model: nn.Module,
    layers: Sequence[MoELayer],
    recipes: Sequence[Recipe],
    statistics: Callable[[int], ExpertStatistics] | None = None,
    provider: LayerProvider | None = None,
    processes: Processes = ALONE,
) -> list[list[LayerReport]]:
    """Compress every MoE layer without running the model: for what needs no token.

    Args:
        model: a causal language model.
        layers: its MoE layers.
        recipes: as in `compress_layers_`.
        statistics: of an earlier run, for the position of a layer; none for what is decided from the weights alone.
        provider: of the layers; by default the model has them in memory.
        processes: that share the work.

    Returns:
        For each recipe, one report a layer.
    """
    provider = provider or LayersInMemory()
    positions = layers_by_position(model, layers)
    for position in progress_bar(range(len(find_decoder_layers(model, layers[0])[1])), "Compressing layers"):
        waiting = [recipe for recipe in recipes if position not in recipe.sink.finished]
        with provider.loaded(position) if waiting else nullcontext():
            if position not in positions:
                for recipe in waiting:
                    recipe.sink.finish(position, None)
            elif waiting:
                sums = statistics and statistics(position)
                measured = unseen_layer(positions[position], position, sums, processes)
                for recipe in waiting:
                    compress_for(measured, recipe, keep_originals(recipes))
    return [recipe.reports for recipe in recipes]


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
