"""The hidden states of all calibration sequences, moved through the decoder one layer at a time."""

from collections.abc import Iterator
from copy import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ...machine.scratch import CopiesInFiles
from ...models.forward import StopForward
from .calls import Call, LayerState, own_containers


__all__ = ["HiddenStream"]

Output = Tensor | tuple  # of a decoder layer: hidden states, or those and what else it hands on


class HiddenStream:
    """The hidden states that enter the next decoder layer, per micro-batch.

    Every layer is called with the arguments that the model itself gives it (`record_layer_calls`), so it computes what
    it would in a forward pass of the whole model.

    Args:
        calls: from `record_layer_calls`.
        spill: folder for a file of the hidden states; in memory by default.
        device: of the layers' inputs; by default that of the calls' hidden states, which may be in files.
    """

    def __init__(self, calls: list[list[Call]], spill: Path | None = None, device: torch.device | None = None) -> None:
        self.hidden: list[Tensor] = [call.hidden for call in calls[0]]
        self.device = device or self.hidden[0].device
        self.files = None if spill is None else CopiesInFiles(spill)
        if self.files is not None:
            self.hidden = [self.files.copy(hidden) for hidden in self.hidden]
        self.calls = [[call._replace(hidden=None) for call in layer] for layer in calls]  # frees the hidden states
        self.states: list[tuple] = [
            () for _ in calls[0]
        ]  # other outputs of the previous layer, where the next one takes any
        self.hands_on = any(_is_state(value) for layer in calls for call in layer for value in call.kwargs.values())

    def fork(self) -> "HiddenStream":
        """Copy the stream where it is, to go on through other layers."""
        other = copy(self)
        other.calls, other.states = own_containers(self.calls), list(self.states)
        other.hidden = list(self.hidden) if self.files is None else [self.files.copy(hidden) for hidden in self.hidden]
        return other

    @torch.no_grad()
    def step(self, position: int, layer: nn.Module) -> None:
        """Run one layer and replace the hidden states by its outputs, batch by batch."""
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
        """Yield the hidden states, one micro-batch at a time."""
        for hidden in self.hidden:
            yield hidden.to(self.device)
            if self.files is not None:
                self.files.unmap_pages()

    @torch.no_grad()
    def outputs(self, position: int, layer: nn.Module) -> Iterator[Tensor]:
        """Yield the outputs of one layer, one micro-batch at a time, without replacing the hidden states by them."""
        for batch in range(len(self.hidden)):
            output = self._call(position, layer, batch)
            if self.files is not None:
                self.files.unmap_pages()
            yield output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def probe(self, position: int, layer: nn.Module) -> None:
        """Run one layer for its hooks only, every micro-batch until a hook ends the forward pass."""
        for batch in range(len(self.hidden)):
            try:
                self._call(position, layer, batch)
            except StopForward:
                if self.files is not None:
                    self.files.unmap_pages()

    def call(self, position: int, layer: nn.Module, batch: int, hidden: Tensor) -> Output:
        """Call one layer for one micro-batch as the model does, on given hidden states."""
        call, states = self.calls[position][batch], self.states[batch]
        kwargs = {name: states[value.output] if _is_state(value) else value for name, value in call.kwargs.items()}
        return layer(hidden, *call.args, **kwargs)

    def _call(self, position: int, layer: nn.Module, batch: int) -> Output:
        return self.call(position, layer, batch, self.hidden[batch].to(self.device))


def _is_state(value: object) -> bool:
    return isinstance(value, LayerState)
