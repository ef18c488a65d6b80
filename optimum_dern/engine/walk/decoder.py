"""Compress a model layer by layer: record a layer's routing, compress it, and run it to get the next layer's input.

    calls of every decoder layer  ->  per layer: load -> probe -> compress -> run -> write, free  ->  next layer

A provider loads the layers, from a model in memory or from a checkpoint on disk.  One pass may serve several recipes:
each original layer is loaded once, and compressed once for each of them.

With sequential calibration (the default) later layers get the outputs of already compressed ones, so that their refits
can correct for them: every recipe then has hidden states of its own.  With "oneshot" every layer gets the outputs of
original layers, and all recipes share these hidden states and the measurements on them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from ...core.layer.statistics import ExpertStatistics
from ...core.neurons.statistics import NeuronStatistics
from ...data.labels import label_tokens, model_inputs
from ...machine.processes import ALONE, Processes
from ...machine.progress import progress_bar
from ...machine.scratch import CopiesInFiles
from ...models.moe.structure import MoELayer, find_decoder_layers, layers_by_position
from ...results.report import LayerReport
from ..layer.importance import gradient_needed
from ..layer.narrowing import find_width, ranks_all_layers, select_in_all_layers
from ..measure.measured import KeptNeurons
from ..measure.measuring import unseen_layer
from .backward import measure_gradients
from .calls import record_layer_calls
from .losses import Loss
from .recipe import Recipe, keep_originals
from .walks import LayerProvider, LayersInMemory, Pass, compress_for, open_walks, pass_layer


__all__ = ["compress_layers_", "compress_unseen_layers_"]


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
    """Compress every MoE layer of a model, in place for a single recipe; with several the model stays unchanged.

    Args:
        model: a causal language model in evaluation mode.
        layers: its MoE layers.
        batches: `input_ids` and `attention_mask` of the calibration sequences; `source` and `position` of each.
        recipes: the results to make; with several, their sinks copy the compressed layers out of the model.
        provider: loads the decoder layers; by default the model has them in memory.
        spill: folder for files of hidden states; in memory by default.
        processes: that share the batches; each is given all of them, and takes its part.
        keep_statistics: called with the position and statistics of every layer measured on original hidden states.

    Returns:
        For each recipe, one report per MoE layer.

    Raises:
        ValueError: a layer received no token, or hidden states that are not finite.
    """
    provider = provider or LayersInMemory()
    _, decoder_layers = find_decoder_layers(model, layers[0])
    positions = layers_by_position(model, layers)
    masks = [batch["attention_mask"].bool() for batch in batches]
    labels = label_tokens(batches, processes)
    inputs = [model_inputs(batch) for batch in processes.share(batches)]
    with provider.outside():
        keep = torch.detach if spill is None else CopiesInFiles(spill).copy
        device = model.get_input_embeddings().weight.device
        calls = record_layer_calls(model, decoder_layers, inputs, keep)
    shared_masks, neurons = processes.share(masks), {}
    for loss in dict.fromkeys(filter(None, (gradient_needed(recipe.config) for recipe in recipes))):
        sequences = Loss(inputs, shared_masks, loss)
        neurons[loss] = measure_gradients(
            model, decoder_layers, positions, calls, sequences, provider, processes, device, spill
        )
    kept = _kept_neurons(recipes, layers[0], neurons)
    common = Pass(shared_masks, labels, processes, keep_originals(recipes), keep_statistics, neurons, kept)
    walks = open_walks(calls, recipes, spill, device)
    del calls
    for position in progress_bar(range(len(decoder_layers)), "Compressing layers"):
        pass_layer(position, decoder_layers[position], positions.get(position), walks, provider, common)
    return [recipe.reports for recipe in recipes]


def _kept_neurons(
    recipes: Sequence[Recipe], layer: MoELayer, neurons: Mapping[str, Mapping[int, NeuronStatistics]]
) -> KeptNeurons:
    """Choose the neurons of all layers, once for the whole pass, for every recipe that ranks them together."""
    kept = {}
    for config in (r.config for r in recipes if ranks_all_layers(layer, r.config, r.num_experts)):
        key = config.importance, find_width(layer, config)
        kept[key] = kept.get(key) or select_in_all_layers(neurons[gradient_needed(config)], key[1], config)
    return kept


def compress_unseen_layers_(
    model: nn.Module,
    layers: Sequence[MoELayer],
    recipes: Sequence[Recipe],
    statistics: Callable[[int], ExpertStatistics] | None = None,
    provider: LayerProvider | None = None,
    processes: Processes = ALONE,
) -> list[list[LayerReport]]:
    """Compress every MoE layer without running the model, from its weights or from recorded statistics.

    Args:
        model: a causal language model.
        layers: its MoE layers.
        recipes: as in `compress_layers_`.
        statistics: returns those that an earlier run recorded for a layer's position; None to use the weights alone.
        provider: loads the decoder layers; by default the model has them in memory.
        processes: that share the work.

    Returns:
        For each recipe, one report per MoE layer.
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
