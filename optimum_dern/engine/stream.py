"""The hidden states of all calibration sequences, walking through the decoder one layer at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration.recording import Call, StopForward


__all__ = ["HiddenStream"]


class HiddenStream:
    """Per micro-batch, the hidden states that enter the next decoder layer.

    Every layer is called with the arguments that the model itself would give it (`record_layer_calls`), so it sees
    what it sees in a whole-model forward.
    """

    def __init__(self, calls: list[list[Call]]) -> None:
        self.calls = calls
        self.hidden: list[Tensor] = [call.hidden for call in calls[0]]

    @torch.no_grad()
    def run(self, position: int, layer: nn.Module) -> list[Tensor]:
        """Outputs of one layer for every micro-batch; the stream itself stays where it is."""
        outputs = []
        for hidden, call in zip(self.hidden, self.calls[position], strict=True):
            output = layer(hidden, *call.args, **call.kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs

    @torch.no_grad()
    def probe(self, position: int, layer: nn.Module) -> None:
        """Run one layer for what its hooks see, each micro-batch only until a hook stops it."""
        for hidden, call in zip(self.hidden, self.calls[position], strict=True):
            try:
                layer(hidden, *call.args, **call.kwargs)
            except StopForward:
                continue

    def advance(self, hidden: Sequence[Tensor]) -> None:
        """Step to the next layer with these hidden states."""
        self.hidden = list(hidden)
