"""Loss of a checkpoint that need not fit into memory: one decoder layer at a time, all texts at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..calibration.recording import record_layer_calls, replay_last_hidden
from ..checkpoint.conversion import NameMap
from ..checkpoint.loader import PartLoader
from ..checkpoint.preparation import open_checkpoint
from ..engine.progress import progress_bar
from ..engine.stream import HiddenStream
from ..models.structure import find_moe_layers
from .perplexity import TextLoss, sequence_losses, summarise


__all__ = ["evaluate_checkpoint"]


@torch.no_grad()
def evaluate_checkpoint(
    model: str | Path, texts: Mapping[str, list[dict]], device: torch.device, **source: Any
) -> dict[str, TextLoss]:
    """Next-token loss of a checkpoint on some texts, its layers loaded one after the other.

    Args:
        model: folder or Hub id.
        texts: token batches by name, as `load_texts` gives them.
        device: where layers are computed.
        **source: `revision`, `token` and `trust_remote_code`.

    Returns:
        What `evaluate_texts` gives for the loaded model.
    """
    reader, skeleton, _ = open_checkpoint(model, **source)
    loader = PartLoader(skeleton, find_moe_layers(skeleton), reader, NameMap(skeleton, list(reader.infos)), device)
    decoder_layers = loader.decoder_layers
    batches = [batch for text in texts.values() for batch in text]
    with loader.outside():
        stream = HiddenStream(record_layer_calls(skeleton, decoder_layers, batches))
    for position in progress_bar(range(len(decoder_layers)), "Evaluating layers"):
        with loader.loaded(position):
            stream.step(position, decoder_layers[position])
    losses = []
    with loader.outside(head=True):
        for batch, hidden in zip(batches, stream.hidden, strict=True):
            inputs = {name: value.to(device) for name, value in batch.items()}
            logits = replay_last_hidden(skeleton, decoder_layers, inputs, hidden)
            losses.append(sequence_losses(logits, inputs["input_ids"], inputs["attention_mask"]))
    remaining = iter(losses)
    return {name: summarise([next(remaining) for _ in text]) for name, text in texts.items()}
