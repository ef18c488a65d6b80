"""The hidden states of all calibration sequences, walking through the decoder one layer at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration.recording import Call, LayerState, StopForward


__all__ = ["HiddenStream"]

Output = Tensor | tuple  # of a decoder layer: hidden states, or those and what else it hands on


class HiddenStream:
    """Per micro-batch, the hidden states that enter the next decoder layer.

    Every layer is called with the arguments that the model itself would give it (`record_layer_calls`), so it sees
    what it sees in a whole-model forward.
    """

    def __init__(self, calls: list[list[Call]]) -> None:
        self.calls = calls
        self.hidden: list[Tensor] = [call.hidden for call in calls[0]]
        self.states: list[tuple] = [() for _ in calls[0]]  # all outputs of the last layer, where any is handed on
        self.hands_on = any(_is_state(value) for layer in calls for call in layer for value in call.kwargs.values())

    @torch.no_grad()
    def run(self, position: int, layer: nn.Module) -> list[Output]:
        """Outputs of one layer for every micro-batch, for `advance`; the stream itself stays where it is."""
        outputs = []
        for batch in range(len(self.hidden)):
            output = self._call(position, layer, batch)
            outputs.append(output[0] if isinstance(output, tuple) and not self.hands_on else output)
        return outputs

    @torch.no_grad()
    def probe(self, position: int, layer: nn.Module) -> None:
        """Run one layer for what its hooks see, each micro-batch only until a hook stops it."""
        for batch in range(len(self.hidden)):
            try:
                self._call(position, layer, batch)
            except StopForward:
                continue

    def advance(self, outputs: Sequence[Output]) -> None:
        """Step to the next layer with these outputs."""
        self.states = [output if isinstance(output, tuple) else () for output in outputs]
        self.hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]

    def _call(self, position: int, layer: nn.Module, batch: int) -> Output:
        call, states = self.calls[position][batch], self.states[batch]
        kwargs = {name: states[value.output] if _is_state(value) else value for name, value in call.kwargs.items()}
        return layer(self.hidden[batch], *call.args, **kwargs)


def _is_state(value: object) -> bool:
    return isinstance(value, LayerState)
