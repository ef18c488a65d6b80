"""Run a model's decoder layers one after the other on some batches, with a context of one's own around each layer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from ...data.labels import model_inputs
from ...machine.progress import progress_bar
from ...machine.scratch import CopiesInFiles
from .calls import record_layer_calls
from .stream import HiddenStream
from .walks import LayerProvider


__all__ = ["visit_layers"]

Visit = Callable[[int], AbstractContextManager]


def visit_layers(
    model: nn.Module,
    decoder_layers: nn.ModuleList,
    batches: Sequence[dict],
    provider: LayerProvider,
    visit: Visit = nullcontext,
    description: str = "Running layers",
    stop: int | None = None,
    spill: Path | None = None,
) -> HiddenStream:
    """Run decoder layers on all batches, one layer in memory at a time.

    Args:
        model: a causal language model in evaluation mode.
        decoder_layers: its decoder layers.
        batches: micro-batches with `input_ids` and perhaps more; what is no argument of the model is left out.
        provider: loads the decoder layers.
        visit: makes the context in which the layer at a position runs, with its weights loaded; by default none.
        description: of the progress bar.
        stop: position of the first layer that is not run; by default all are.
        spill: folder for a file of the hidden states; in memory by default.

    Returns:
        The hidden states behind the last layer that has run.
    """
    with provider.outside():
        device = model.get_input_embeddings().weight.device
        keep = torch.detach if spill is None else CopiesInFiles(spill).copy
        inputs = [model_inputs(batch) for batch in batches]
        stream = HiddenStream(record_layer_calls(model, decoder_layers, inputs, keep), spill, device)
    for position in progress_bar(range(len(decoder_layers))[:stop], description):
        with torch.no_grad(), provider.loaded(position), visit(position):
            stream.step(position, decoder_layers[position])
    return stream
