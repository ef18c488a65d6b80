"""Hooks that record the residual stream before the experts, for the criterion that compares their output with it.

A MoE block does not get the residual stream itself, only its normalised form.  But the tensor that the experts receive
is the output of one of the decoder layer's modules, their norm, and that module's input is the residual stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...core.layer.mixture import Routing
from ...data.labels import real_tokens
from ...models.moe.overrides import routing_hook
from ...models.moe.structure import MoELayer


__all__ = ["ResidualRecord", "record_residual"]


class ResidualRecord:
    """The residual stream before the experts, per micro-batch."""

    def __init__(self) -> None:
        self.streams: list[Tensor] = []

    def without_padding(self, masks: Sequence[Tensor]) -> Tensor:
        """Concatenate the residual stream of all micro-batches, without padding tokens: (T, d).

        Args:
            masks: per micro-batch, (batch, sequence) bool, True for a real token.
        """
        pairs = zip(self.streams, masks, strict=True)
        return torch.cat([stream[real_tokens(mask, stream.device)] for stream, mask in pairs])


@contextmanager
def record_residual(decoder_layer: nn.Module, layer: MoELayer) -> Iterator[ResidualRecord]:
    """Record the residual stream of every call of a decoder layer while the context is open.

    Open this context before one whose hook ends the forward pass at the experts.

    Args:
        decoder_layer: the decoder layer around the MoE layer.
        layer: its MoE layer.

    Raises:
        ValueError: the experts' input is not the output of one of the decoder layer's modules.
    """
    record = ResidualRecord()
    norms: list[tuple[Tensor, Tensor]] = []  # of this call; kept alive, so that addresses stay unique

    def begin(module: nn.Module, args: tuple) -> None:
        norms.clear()

    def after_part(module: nn.Module, args: tuple, output: object) -> None:
        if len(args) == 1 and all(isinstance(value, Tensor) for value in (args[0], output)):
            norms.append((args[0], output))

    def receive(routing: Routing) -> None:
        for before, after in reversed(norms):
            if after.data_ptr() == routing.hidden.data_ptr() and before.numel() == routing.hidden.numel():
                record.streams.append(before.detach().flatten(0, -2).clone())
                norms.clear()
                return
        raise ValueError(
            f"selection='easy_ep' needs the residual stream before the experts, but those of {layer.name} do not "
            "receive what a norm of their decoder layer returns; choose another selection, such as 'reap'"
        )

    handles = [decoder_layer.register_forward_pre_hook(begin)]
    handles += [part.register_forward_hook(after_part) for part in decoder_layer.children()]
    handles += [routing_hook(layer.experts)(layer.block, layer.experts, receive)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
