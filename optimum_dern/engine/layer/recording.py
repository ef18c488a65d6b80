"""Hooks that record how a MoE layer routes its tokens, and that are always removed.

Routing is read from the arguments of the experts module (hidden states, indices, weights): exactly the tensors that
the model mixes its experts with, whatever its router does.  `models.moe.overrides` knows the exceptions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ...core.layer.mixture import Routing
from ...models.moe.overrides import routing_hook


__all__ = ["RoutingRecord", "StopForward", "record_routing", "run_until_stopped"]


class StopForward(Exception):
    """Ends a forward pass that has seen enough."""


class RoutingRecord:
    """Per micro-batch: what the experts received, and the call of the block around them."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []
        self.block_calls: list[tuple[tuple, dict]] = []

    def without_padding(self, masks: Sequence[Tensor]) -> Routing:
        """All micro-batches together, real tokens only.

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
        experts: whose routing `models.moe.overrides` can read.
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
    """Call a module whose hooks may end the pass with `StopForward`."""
    try:
        module(*args, **kwargs)
    except StopForward:
        return
