"""The hidden states of all calibration sequences, walking through the decoder one layer at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...machine.scratch import CopiesInFiles
from ..layer.recording import StopForward
from .calls import Call, LayerState


__all__ = ["HiddenStream"]

Output = Tensor | tuple  # of a decoder layer: hidden states, or those and what else it hands on


class HiddenStream:
    """Per micro-batch, the hidden states that enter the next decoder layer.

    Every layer is called with the arguments that the model itself would give it (`record_layer_calls`), so it sees
    what it sees in a whole-model forward.

    Args:
        calls: of `record_layer_calls`.
        spill: folder for a file of the hidden states; in memory by default.
    """

    def __init__(self, calls: list[list[Call]], spill: Path | None = None) -> None:
        self.hidden: list[Tensor] = [call.hidden for call in calls[0]]
        self.device = self.hidden[0].device
        self.files = None if spill is None else CopiesInFiles(spill)
        if self.files is not None:
            self.hidden = [self.files.copy(hidden) for hidden in self.hidden]
        self.calls = [[call._replace(hidden=None) for call in layer] for layer in calls]  # the first ones can go
        self.states: list[tuple] = [
            () for _ in calls[0]
        ]  # outputs of the last layer besides them, where any is handed on
        self.hands_on = any(_is_state(value) for layer in calls for call in layer for value in call.kwargs.values())

    @torch.no_grad()
    def step(self, position: int, layer: nn.Module) -> None:
        """Run one layer and step to the next: its outputs take the place of its inputs, batch by batch."""
        for batch in range(len(self.hidden)):
            output = self._call(position, layer, batch)
            hidden = output[0] if isinstance(output, tuple) else output
            self.states[batch] = (None, *output[1:]) if isinstance(output, tuple) and self.hands_on else ()
            if self.files is not None:
                self.hidden[batch].copy_(hidden)
                self.files.unmap_pages()
            else:
                self.hidden[batch] = hidden

    def __iter__(self) -> Iterator[Tensor]:
        """The hidden states, a micro-batch at a time."""
        for hidden in self.hidden:
            yield hidden.to(self.device)
            if self.files is not None:
                self.files.unmap_pages()

    @torch.no_grad()
    def outputs(self, position: int, layer: nn.Module) -> Iterator[Tensor]:
        """What one layer would make of the hidden states, a micro-batch at a time; they stay before it."""
        for batch in range(len(self.hidden)):
            output = self._call(position, layer, batch)
            if self.files is not None:
                self.files.unmap_pages()
            yield output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def probe(self, position: int, layer: nn.Module) -> None:
        """Run one layer for what its hooks see, each micro-batch only until a hook stops it."""
        for batch in range(len(self.hidden)):
            try:
                self._call(position, layer, batch)
            except StopForward:
                if self.files is not None:
                    self.files.unmap_pages()

    def _call(self, position: int, layer: nn.Module, batch: int) -> Output:
        call, states = self.calls[position][batch], self.states[batch]
        kwargs = {name: states[value.output] if _is_state(value) else value for name, value in call.kwargs.items()}
        return layer(self.hidden[batch].to(self.device), *call.args, **kwargs)


def _is_state(value: object) -> bool:
    return isinstance(value, LayerState)
