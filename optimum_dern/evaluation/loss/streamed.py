"""Evaluation of a checkpoint that does not fit into memory, one decoder layer at a time on all batches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.source.find import find_checkpoint
from ...engine.walk.calls import replay_last_hidden
from ...engine.walk.visit import visit_layers
from .perplexity import TextLoss, evaluate_texts


__all__ = ["StreamedCheckpoint", "evaluate_checkpoint"]


class StreamedCheckpoint:
    """Checkpoint that evaluation functions take instead of a loaded model; each evaluation reads it once.

    Only one decoder layer and the hidden states of all batches are in memory.

    Args:
        model: folder or Hub id.
        device: to compute on.
        **source: `revision`, `token`, `trust_remote_code` and `dtype`.
    """

    def __init__(self, model: str | Path, device: torch.device, **source: Any) -> None:
        found = find_checkpoint(model, **source)
        self.skeleton, self.config = found.skeleton, found.skeleton.config
        self.loader = found.open_loader(device)

    @torch.no_grad()
    def stream_logits(self, batches: Sequence[dict]) -> Iterator[Tensor]:
        """Yield the logits of every batch, (batch, sequence, vocabulary), one batch at a time."""
        loader, decoder_layers = self.loader, self.loader.decoder_layers
        stream = visit_layers(self.skeleton, decoder_layers, batches, loader, description="Evaluating layers")
        with loader.outside(head=True):
            for batch, hidden in zip(batches, stream.hidden, strict=True):
                inputs = {name: value.to(loader.device) for name, value in batch.items()}
                yield replay_last_hidden(self.skeleton, decoder_layers, inputs, hidden)


def evaluate_checkpoint(
    model: str | Path, texts: Mapping[str, list[dict]], device: torch.device, **source: Any
) -> dict[str, TextLoss]:
    """Measure the next-token loss of a checkpoint on some texts, with one decoder layer in memory at a time.

    Args:
        model: folder or Hub id.
        texts: token batches by name, as `load_texts` gives them.
        device: to compute on.
        **source: `revision`, `token`, `trust_remote_code` and `dtype`.

    Returns:
        The loss by name of the text, as `evaluate_texts` gives it for the loaded model.
    """
    return evaluate_texts(StreamedCheckpoint(model, device, **source), texts)
