"""Forward hooks that record how a MoE layer routes its tokens, removed at the end of a context.

Routing is read from the arguments of the experts module (hidden states, indices, weights): exactly the tensors that
the model mixes its experts with, whatever its router does.  `models.moe.overrides` has the exceptions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ...core.layer.mixture import Routing
from ...models.moe.overrides import routing_hook


__all__ = ["RoutingRecord", "StopForward", "record_routing", "run_until_stopped"]


class StopForward(Exception):
    """Raised by a hook to end a forward pass early, once everything is recorded."""


class RoutingRecord:
    """The inputs and routing of the experts, and the arguments of the MoE block around them, per micro-batch."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []
        self.block_calls: list[tuple[tuple, dict]] = []

    def without_padding(self, masks: Sequence[Tensor]) -> Routing:
        """Concatenate the routing of all micro-batches, without padding tokens.

        Args:
            masks: per micro-batch, (batch, sequence) bool, True for a real token.
        """
        kept = [r.select(mask.flatten().to(r.index.device)) for r, mask in zip(self.routings, masks, strict=True)]
        return Routing.concatenate(kept)


@contextmanager
def record_routing(block: nn.Module, experts: nn.Module, stop: bool = False) -> Iterator[RoutingRecord]:
    """Record every call of an experts module while the context is open.

    Args:
        block: the MoE block around the experts.
        experts: the experts module, of a kind that `models.moe.overrides` can read the routing of.
        stop: raise `StopForward` instead of computing the experts.
    """
    record = RoutingRecord()

    def before_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        record.block_calls.append((args, kwargs))

    def receive(routing: Routing) -> None:
        record.routings.append(routing)
        if stop:
            raise StopForward

    handles = [
        block.register_forward_pre_hook(before_block, with_kwargs=True),
        routing_hook(experts)(block, experts, receive),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def run_until_stopped(module: nn.Module, *args, **kwargs) -> None:
    """Call a module whose hooks may end the forward pass with `StopForward`."""
    try:
        module(*args, **kwargs)
    except StopForward:
        return
